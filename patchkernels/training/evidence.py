"""What is known of a run with patches against token-level training at equal compute, from comparisons that were made.

What decides is not known well: it may be the size of the model, the tokens a parameter, and more. So a planned run is
set beside the nearest comparison, and beside what was published.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Observation(NamedTuple):
    """``L_C - L_B`` in nats: by how much patches (B) ended lower than token-level training with their compute (C).

    K = 4 on two thirds of the text, vocabularies of 512 and 4096 tokens.
    """

    parameters: int
    tokens_per_parameter: float  # of all raw tokens that B reads
    seeds: int
    gain: float  # the mean over seeds
    low: float  # the interval of the mean, with 95 % confidence; the gain itself for one seed
    high: float

    @property
    def outcome(self) -> str:
        """In words: "won" or "lost" only where several seeds say so."""
        amount = f"{abs(self.gain):.3f} nats {'lower' if self.gain > 0 else 'higher'}"
        if self.seeds == 1:
            return f"ended {amount} (one seed, which proves little)"
        interval = f"{self.seeds} seeds, {self.low:+.3f} to {self.high:+.3f} with 95 % confidence"
        if self.low <= 0 <= self.high:
            return f"could not be told from it (difference {self.gain:+.3f}; {interval})"
        return f"{'won' if self.gain > 0 else 'lost'}: they ended {amount} ({interval})"


# The table in bench/results/amd-epyc/law/law.md.
OBSERVATIONS = (
    Observation(41_632, 16.5, 3, -0.148, -0.261, -0.035),
    Observation(41_632, 49.6, 3, -0.078, -0.129, -0.026),
    Observation(41_632, 99.8, 3, -0.033, -0.076, 0.011),
    Observation(41_632, 331, 3, -0.016, -0.048, 0.017),
    Observation(183_744, 17.0, 3, -0.160, -0.303, -0.018),
    Observation(183_744, 50, 3, 0.089, -0.368, 0.546),
    Observation(183_744, 100, 3, 0.174, -0.209, 0.556),
    Observation(183_744, 326, 3, 0.104, -0.211, 0.419),
    Observation(1_328_256, 1.04, 2, -0.223, -0.391, -0.056),
    Observation(1_328_256, 4.14, 2, 0.064, -4.076, 4.203),
    Observation(1_328_256, 16.6, 1, -0.031, -0.031, -0.031),
)
FAR = 1.0  # a distance of this many factors of ten, in parameters and tokens a parameter together
PUBLISHED = (
    "Published: TST (arXiv 2605.06546) ends lower at equal compute, at 270M to 3B parameters. PatchTrain (arXiv "
    "2407.12665) ends lower on the same 360B tokens at half the compute at 370M and 780M, and higher at 1.3B and 2.7B."
)


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
        f"The run reads {tokens_per_parameter:.3g} tokens a parameter. In our nearest comparison with token-level "
        f"training at equal compute (K = 4 on two thirds of the text, {seen.parameters:,} parameters, "
        f"{seen.tokens_per_parameter:.3g} tokens a parameter) patches {seen.outcome}.{far}\n{PUBLISHED}"
    )
