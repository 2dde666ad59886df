"""Where patches have been seen to win, to tie and to lose against token-level training at equal compute.

What decides is not known well: the size of the model and the tokens a parameter both count. So a planned run is
compared with the nearest comparison that was made.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Observation(NamedTuple):
    """How a run with patches (B) ended against token-level training with its compute (C): ``L_C - L_B`` in nats."""

    source: str
    parameters: int
    tokens_per_parameter: float  # of all raw tokens that B reads
    low: float  # the interval of the mean over seeds with 95 % confidence; of a single run the value itself
    high: float

    @property
    def outcome(self) -> str:
        return "won" if self.low > 0 else "lost" if self.high < 0 else "tied"


OURS = "docs/method.md"
PATCHTRAIN = "PatchTrain, arXiv 2407.12665"  # perplexities at half the compute that are below those at all of it
MINIMIND = "the README of HST-MiniMind"  # in positions, of which a patch run has fewer than tokens
OBSERVATIONS = (
    Observation(OURS, 41_632, 16.5, -0.261, -0.035),
    Observation(OURS, 41_632, 49.6, -0.129, -0.026),
    Observation(OURS, 41_632, 99.8, -0.076, 0.011),
    Observation(OURS, 41_632, 331, -0.048, 0.017),
    Observation(OURS, 1_328_256, 1.04, -0.391, -0.056),
    Observation(OURS, 1_328_256, 4.14, -4.076, 4.203),
    Observation(OURS, 1_328_256, 16.6, -0.031, -0.031),
    Observation(MINIMIND, 5_000_000, 50, 0.0, 0.0),
    Observation(MINIMIND, 5_000_000, 300, 0.047, 0.047),
    Observation(PATCHTRAIN, 370_000_000, 973, math.log(10.94 / 10.68), math.log(10.94 / 10.68)),
    Observation(PATCHTRAIN, 780_000_000, 462, math.log(9.18 / 9.10), math.log(9.18 / 9.10)),
)
"""Ours: K = 4 on two thirds of the text, one to three seeds, every arm at the best of its learning rates."""
FAR = 1.0  # a distance of this many factors of ten, in parameters and tokens a parameter together


def nearest(parameters: int, tokens_per_parameter: float) -> tuple[Observation, float]:
    """The observation that is nearest to a run, and its distance in factors of ten."""

    def distance(seen: Observation) -> float:
        by_size = abs(math.log10(seen.parameters / parameters))
        return by_size + abs(math.log10(seen.tokens_per_parameter / tokens_per_parameter))

    found = min(OBSERVATIONS, key=distance)
    return found, distance(found)


def statement(parameters: int, tokens_per_parameter: float) -> str:
    """What is known of a run with patches of this size."""
    seen, distance = nearest(parameters, tokens_per_parameter)
    far = " That is far from this run: try both with `patchkernels experiment`." if distance > FAR else ""
    return (
        f"The run reads {tokens_per_parameter:.3g} tokens a parameter. In the nearest comparison with token-level "
        f"training at equal compute, {seen.parameters:,} parameters and {seen.tokens_per_parameter:.3g} tokens a "
        f"parameter, patches {seen.outcome} ({seen.source}).{far}"
    )
