"""The settings of an experiment: budgets, arms, and what the command line asks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from patchkernels.data import DataConfig
from patchkernels.schedule import cost_of, parse_phases


@dataclass(frozen=True)
class Budget:
    """What an experiment costs."""

    model: str
    tokens: float  # raw tokens of arm A
    vocab_size: int
    batch_size: int
    context: int
    lr: float
    seeds: int
    minutes: float
    bf16: bool
    compile: bool
    eval_every: int
    eval_rows: int


BUDGETS = {
    # 1.3M parameters, 2 cores: the six runs of two seeds, and two more learning rates of each arm
    "cpu": Budget("demo", 1_376_256, 4096, 8, 128, 3e-3, 2, 24.0, False, False, 60, 128),
    # 42M parameters, one H200; a call ends within 9 minutes, several calls go on with each other
    "gpu": Budget("42m", 100_663_296, 32000, 64, 1024, 2e-3, 3, 8.0, True, True, 100, 128),
}


@dataclass(frozen=True)
class Arm:
    """A training run of the experiment; what it does not say is the same for all."""

    title: str
    phases: str
    share: float = 1.0  # of the experiment's raw tokens
    changes: dict[str, Any] = field(default_factory=dict)


def arms(phases: str) -> dict[str, Arm]:
    """All arms by name; ``phases`` are B's."""
    cost = cost_of(parse_phases(phases))
    reset = {"optimizer_at_switch": "reset", "lr_scope": "phase"}
    return {
        "A": Arm("token-level, all data", "1:1"),
        "B": Arm("patches, then token-level", phases),
        "C": Arm("token-level, B's compute", "1:1", share=cost),
        "B-reset": Arm("B, optimizer and schedule reset at the switch (PatchTrain)", phases, changes=reset),
        "TST": Arm("K = 8, r = 0.3 of the steps (TST)", "8:0.3,1:0.7", changes={"shares_of": "steps"}),
        "multi": Arm("K = 8, 4, 2, 1", "8:1/3,4:1/6,2:1/6,1:1/3"),
    }


NAMES = tuple(arms("1:1"))


@dataclass
class ExperimentConfig:
    """What `patchkernels experiment` is asked. An unfinished experiment goes on when it is called again."""

    out: str = "runs/experiment"
    """The experiment's folder: runs/, results.jsonl, report.md and its figures."""
    budget: str = "cpu"
    """cpu: 25 minutes on 2 cores; gpu: calls of 9 minutes on an H200. What follows replaces parts of it."""
    arms: tuple[str, ...] = ("A", "B", "C")
    """Of A, B, C, B-reset (optimizer and schedule reset at the switch), TST (K = 8, r = 0.3), multi (K = 8, 4, 2, 1).
    More may be asked for later; runs that are finished stay."""
    phases: str = "4:2/3,1:1/3"
    """B's patch sizes and shares of the data."""
    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = None
    tokens: float | None = None
    """Raw tokens of arm A, no token twice; cut to what all arms can read in whole steps."""
    batch_size: int | None = None
    accumulation: int = 1
    context: int | None = None
    lr: float | None = None
    """Where tuning starts, or the learning rate itself with --no-tune."""
    tune: bool = True
    """Tune the learning rate on A, by factors of 2 until the best lies between two; try its neighbours on B and C."""
    warmup: float = 0.05
    """Share of A's steps; the other arms warm up over as many steps."""
    decay: float = 0.2
    """Share of the steps that WSD decays over."""
    seeds: int | None = None
    minutes: float | None = None
    """The call stops, saved, after so long with exit code 75; the same command goes on."""
    compile: bool | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {tuple(BUDGETS)}, got {self.budget!r}")
        unknown = [name for name in self.arms if name not in NAMES]
        if unknown or not {"A", "B", "C"} <= set(self.arms):
            raise ValueError(f"arms must be A, B, C and others of {NAMES}, got {self.arms}")
        given = {k: v for k in ("tokens", "batch_size", "context", "lr", "seeds", "minutes") if (v := getattr(self, k))
                 is not None}  # fmt: skip
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if parse_phases(self.phases)[-1].patch_size != 1:
            raise ValueError(f"the last phase must be token-level, as in '4:2/3,1:1/3'; got {self.phases!r}")
        largest = max(p.patch_size for name in self.arms for p in parse_phases(arms(self.phases)[name].phases))
        if largest == 1:
            raise ValueError(f"B needs a phase of patches, as in '4:2/3,1:1/3'; got {self.phases!r}")
        if self.filled().context < 2 * largest:
            raise ValueError(f"context must be at least two patches of {largest}, got {self.filled().context}")

    def filled(self) -> Budget:
        """The budget, with what was given in its places."""
        mine = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Budget)}
        mine["vocab_size"] = self.data.vocab_size
        return dataclasses.replace(BUDGETS[self.budget], **{k: v for k, v in mine.items() if v is not None})
