"""Phases of a run, the steps that they take, and the learning rate over these steps.

A phase reads a share lambda of the raw tokens in patches of K tokens. Relative to token-level training on the same
tokens, the phases cost (PatchTrain, arXiv 2407.12665, section 2)

    cost = sum_i lambda_i / K_i

TST (arXiv 2605.06546) gives each phase a share r of the steps instead. If all steps have the same number of positions,
the shares of the data are

    lambda_i = r_i K_i / sum_j r_j K_j
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

CONVENTIONS = ("positions", "tokens")
SHARES = ("data", "steps")
DECAYS = ("wsd", "cosine")
SCOPES = ("run", "phase")
OPTIMIZER_AT_SWITCH = ("carry", "reset")
Share = float | str | Fraction
Phases = str | Sequence[tuple[int, Share]]  # as a user writes them, see parse_phases
DEFAULT_PHASES = "4:2/3,1:1/3"  # PatchTrain's setting, half the cost of token-level training


@dataclass(frozen=True)
class Phase:
    """A part of a run in which one patch size is used."""

    patch_size: int  # K
    share: float  # lambda, of all raw tokens


def parse_phases(phases: Phases, shares_of: str = "data", convention: str = "positions") -> tuple[Phase, ...]:
    """Reads phases, each a patch size and a share: ``"4:2/3,1:1/3"``, or pairs such as ``[(4, 2 / 3), (1, 1 / 3)]``.

    ``shares_of`` says whether these are shares of the data (lambda) or of the steps (r). The two are the same if all
    steps read the same number of raw tokens (``convention="tokens"``).

    Raises:
        ValueError: these are not phases, a patch size or a share is not positive, the shares do not add up to 1, or
            ``shares_of`` is unknown.
    """
    if shares_of not in SHARES:
        raise ValueError(f"shares must be of one of {SHARES}, got {shares_of!r}")
    parts = phases.replace(",", " ").split() if isinstance(phases, str) else phases
    if not isinstance(parts, Sequence):
        raise ValueError(f"phases look like '4:2/3,1:1/3' or [(4, 2 / 3), (1, 1 / 3)]; got {phases!r}")
    parsed = [parse_phase(part) for part in parts]
    if not parsed or any(phase.patch_size < 1 or not phase.share > 0 for phase in parsed):
        raise ValueError(f"phases need patch sizes of at least 1 and positive shares, got {phases!r}")
    total = sum(phase.share for phase in parsed)
    if not abs(total - 1) <= 1e-3:
        raise ValueError(f"the shares must add up to 1, got {total:.4g} from {phases!r}")
    in_steps = shares_of == "steps" and convention == "positions"
    tokens = [phase.share * (phase.patch_size if in_steps else 1) for phase in parsed]
    return tuple(Phase(phase.patch_size, count / sum(tokens)) for phase, count in zip(parsed, tokens))


def parse_phase(part: str | tuple[int, Share]) -> Phase:
    """The phase that ``"4:2/3"``, ``(4, 2 / 3)`` or ``(4, "2/3")`` stands for, each a patch size and a share."""
    try:
        size, share = part.split(":") if isinstance(part, str) else part
        if isinstance(size, bool) or (not isinstance(size, str) and size != int(size)):
            raise ValueError
        return Phase(int(size), float(Fraction(share)))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f"phases look like '4:2/3,1:1/3', patch size and share; got {part!r}") from None


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of the phases over ``total_tokens`` raw tokens.

    A step reads ``batch_size`` rows. A row of a phase with patch size K has

        convention "positions":  context K raw tokens, context positions      (every step costs the same FLOPs)
        convention "tokens":     context raw tokens, context / K positions    (every step reads the same raw tokens)

    The text is cut into pieces of ``piece_tokens`` raw tokens, each a whole number of rows in every phase.

    Raises:
        ValueError: an unknown convention, a number below 1, a context that K does not divide, pieces that are not a
            whole number of rows, or so few tokens that a phase has no step.
    """

    phases: tuple[Phase, ...]
    total_tokens: int
    batch_size: int
    context: int
    convention: str = "positions"
    piece_tokens: int = 0  # 0 stands for the smallest possible piece

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {CONVENTIONS}, got {self.convention!r}")
        for field in ("total_tokens", "batch_size", "context"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for phase in self.phases:
            if self.row_tokens(phase) % phase.patch_size:
                raise ValueError(
                    f"context must be divisible by the patch size, got {self.context} and {phase.patch_size}"
                )
        smallest_piece = math.lcm(*(self.row_tokens(phase) for phase in self.phases))
        if not self.piece_tokens:
            object.__setattr__(self, "piece_tokens", smallest_piece)  # the instance is frozen
        if self.piece_tokens % smallest_piece:
            raise ValueError(
                f"piece_tokens must be a multiple of every phase's row, got {self.piece_tokens} and rows of "
                f"{[self.row_tokens(phase) for phase in self.phases]}"
            )
        if min(self.steps) < 1:
            raise ValueError(
                f"{self.total_tokens} tokens give {self.steps} steps by phase at {self.batch_size} rows of "
                f"{self.context} positions; every phase needs one"
            )

    def row_tokens(self, phase: Phase) -> int:
        """Raw tokens of a row."""
        return self.context * (phase.patch_size if self.convention == "positions" else 1)

    def positions(self, phase: Phase) -> int:
        """Positions of a row."""
        return self.row_tokens(phase) // phase.patch_size

    @functools.cached_property
    def steps(self) -> list[int]:
        """Optimizer steps of each phase. Rounding the phases' ends, not their lengths, keeps errors from adding up."""
        exact = [phase.share * self.total_tokens / (self.batch_size * self.row_tokens(phase)) for phase in self.phases]
        ends = [round(end) for end in accumulate(exact)]
        return [end - start for start, end in zip([0, *ends], ends)]

    @functools.cached_property
    def total_steps(self) -> int:
        return sum(self.steps)

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first step of each phase."""
        return [0, *accumulate(self.steps)][:-1]

    def locate(self, step: int) -> tuple[int, int]:
        """The index of the phase that a step belongs to, and how many steps of that phase come before it."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step must be in [0, {self.total_steps}), got {step}")
        index = max(i for i, start in enumerate(self.starts) if start <= step)
        return index, step - self.starts[index]

    def raw_tokens(self, step: int) -> int:
        """Raw tokens that are read before ``step``."""
        return sum(
            min(max(step - start, 0), steps) * self.batch_size * self.row_tokens(phase)
            for phase, start, steps in zip(self.phases, self.starts, self.steps)
        )

    @property
    def cost(self) -> float:
        """The cost of the phases, see :func:`cost_of`."""
        return cost_of(self.phases)


def cost_of(phases: tuple[Phase, ...]) -> float:
    """``sum_i lambda_i / K_i``: positions of these phases per position of token-level training on the same data."""
    return sum(phase.share / phase.patch_size for phase in phases)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every step: a linear warmup, then a constant with a linear decay ("wsd") or a cosine.

    With ``S`` steps, of which ``W = warmup S`` are warmup and ``D = decay S`` are decay, step ``s`` has

        s < W:         peak (s + 1) / W
        "wsd":         peak min(1, (S - s) / D)
        "cosine":      peak (0.1 + 0.9 (1 + cos(pi (s - W) / (S - W))) / 2)

    ``scope="run"`` counts steps from the start of the run, ``"phase"`` from the start of each phase.

    Raises:
        ValueError: an unknown shape or scope, or a number out of range.
    """

    peak: float
    warmup: float  # share of the steps
    decay: float = 0.1  # share of the steps
    shape: str = "wsd"
    scope: str = "run"

    def __post_init__(self) -> None:
        if self.shape not in DECAYS or self.scope not in SCOPES:
            raise ValueError(f"expected one of {DECAYS} over one of {SCOPES}, got {self.shape!r} over {self.scope!r}")
        if not (0 < self.peak < math.inf and 0 <= self.warmup < 1 and 0 <= self.decay <= 1):
            raise ValueError(f"expected a finite lr > 0, warmup in [0, 1), decay in [0, 1], got {self}")

    def at(self, step: int, schedule: Schedule) -> float:
        """The learning rate of a step of the schedule."""
        total = schedule.total_steps
        if self.scope == "phase":
            index, step = schedule.locate(step)
            total = schedule.steps[index]
        warmup = round(self.warmup * total)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.shape == "cosine":
            done = (step - warmup) / max(total - warmup, 1)
            return self.peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        decay = max(round(self.decay * total), 1)
        return self.peak * min(1.0, (total - step) / decay)
