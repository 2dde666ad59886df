"""The schedule: phases of a patch size and a share of the data, steps, and the learning rate over them.

cost = sum_i lambda_i / K_i                    against token-level training on the same data
lambda_i = r_i K_i / sum_j r_j K_j             from shares r of steps at constant positions (TST)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

CONVENTIONS = ("positions", "tokens")
SHARES = ("data", "steps")
DECAYS = ("wsd", "cosine")
SCOPES = ("run", "phase")


@dataclass(frozen=True)
class Phase:
    """K and the share of the raw tokens that is read in patches of K."""

    patch_size: int
    share: float


def parse_phases(text: str, shares_of: str = "data", convention: str = "positions") -> tuple[Phase, ...]:
    """``"4:2/3,1:1/3"`` to phases, shares of the data (lambda) or of the steps (r). ``ValueError`` on nonsense.

    At constant raw tokens a step both shares are the same.
    """
    if shares_of not in SHARES:
        raise ValueError(f"shares must be of one of {SHARES}, got {shares_of!r}")
    phases = []
    for part in text.replace(",", " ").split():
        try:
            size, share = part.split(":")
            phases.append(Phase(int(size), float(Fraction(share))))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"phases look like '4:2/3,1:1/3', patch size and share; got {part!r}") from None
    if not phases or any(p.patch_size < 1 or p.share <= 0 for p in phases):
        raise ValueError(f"phases need patch sizes of at least 1 and positive shares, got {text!r}")
    total = sum(p.share for p in phases)
    if abs(total - 1) > 1e-3:
        raise ValueError(f"the shares must add up to 1, got {total:.4g} from {text!r}")
    weight = [p.share * (p.patch_size if shares_of == "steps" and convention == "positions" else 1) for p in phases]
    return tuple(Phase(p.patch_size, w / sum(weight)) for p, w in zip(phases, weight))


@dataclass(frozen=True)
class Schedule:
    """Phases laid over ``total_tokens`` raw tokens.

    ``context`` is the positions of a row in the token phase. By convention ``"positions"`` every row has so many
    (equal FLOPs a step; a patch row reads K times the raw tokens), by ``"tokens"`` every row has so many raw tokens
    (a patch row has 1/K of the positions).
    """

    phases: tuple[Phase, ...]
    total_tokens: int
    batch_size: int  # rows a step
    context: int
    convention: str = "positions"
    piece_tokens: int | None = None  # of the pieces that text is cut into; None: the fewest that will do

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
        if self.unit_tokens % math.lcm(*(self.row_tokens(phase) for phase in self.phases)):
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

    @property
    def unit_tokens(self) -> int:
        """The pieces that text is cut into: whole rows of every phase."""
        return self.piece_tokens or math.lcm(*(self.row_tokens(phase) for phase in self.phases))

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of each phase; rounded where phases end, so that the sum is the rounded total."""
        exact = [p.share * self.total_tokens / (self.batch_size * self.row_tokens(p)) for p in self.phases]
        ends = [round(end) for end in accumulate(exact)]
        return [end - start for start, end in zip([0, *ends], ends)]

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    @property
    def starts(self) -> list[int]:
        """The first step of each phase."""
        return [0, *accumulate(self.steps)][:-1]

    def locate(self, step: int) -> tuple[int, int]:
        """(phase index, step within the phase) of a step."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step must be in [0, {self.total_steps}), got {step}")
        index = max(i for i, start in enumerate(self.starts) if start <= step)
        return index, step - self.starts[index]

    def raw_tokens(self, step: int) -> int:
        """Raw tokens read before ``step``."""
        return sum(
            min(max(step - start, 0), steps) * self.batch_size * self.row_tokens(phase)
            for phase, start, steps in zip(self.phases, self.starts, self.steps)
        )

    @property
    def cost(self) -> float:
        """That of :func:`cost_of` the phases."""
        return cost_of(self.phases)


def cost_of(phases: tuple[Phase, ...]) -> float:
    """Positions against token-level training on the same data: ``sum lambda / K``."""
    return sum(phase.share / phase.patch_size for phase in phases)


@dataclass(frozen=True)
class LearningRate:
    """Warmup, then WSD (constant, and linear to 0 over the last ``decay`` of the steps) or cosine to a tenth."""

    peak: float
    warmup: float  # share of the steps
    decay: float = 0.1
    shape: str = "wsd"
    scope: str = "run"

    def __post_init__(self) -> None:
        if self.shape not in DECAYS or self.scope not in SCOPES:
            raise ValueError(f"expected one of {DECAYS} over one of {SCOPES}, got {self.shape!r} over {self.scope!r}")
        if not (0 < self.peak < math.inf and 0 <= self.warmup < 1 and 0 <= self.decay <= 1):
            raise ValueError(f"expected a finite lr > 0, warmup in [0, 1), decay in [0, 1], got {self}")

    def at(self, step: int, schedule: Schedule) -> float:
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
