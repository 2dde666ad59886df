"""The settings of an experiment: its budgets, its arms, and the options of its command.

A budget holds a complete :class:`~patchkernels.training.config.TrainConfig`, its base. The settings of every run are
made from the base, so that all settings that the experiment does not change are defined there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from patchkernels.data.corpus import DataConfig
from patchkernels.schedule import DEFAULT_PHASES, cost_of, parse_phase
from patchkernels.training.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

Settings = TypeVar("Settings", DataConfig, LogConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig)


@dataclass(frozen=True)
class Budget:
    """The cost of an experiment: the size of its runs, the number of seeds, and how long a call may take."""

    base: TrainConfig  # its tokens are those that arm A reads
    seeds: int
    minutes: float  # after which a call stops


BUDGETS = {
    # 1.3M parameters on 2 cores. The minutes suffice for A, B and C with two seeds, tuning included.
    "cpu": Budget(
        TrainConfig(
            run=RunConfig(bf16=False, compile=False),
            data=DataConfig(vocab_size=4096),
            model=ModelConfig("demo"),
            schedule=ScheduleConfig(tokens=1_376_256, batch_size=8, context=128),
            optimizer=OptimizerConfig(lr=3e-3),
            checkpoint=CheckpointConfig(save_every=120, keep=1),
            log=LogConfig(eval_every=60, eval_rows=128),
        ),
        seeds=2,
        minutes=24.0,
    ),
    # 42M parameters on one H200. A call ends within 9 minutes; several calls finish the experiment.
    "gpu": Budget(
        TrainConfig(
            run=RunConfig(bf16=True, compile=True),
            data=DataConfig(vocab_size=32000),
            model=ModelConfig("42m"),
            schedule=ScheduleConfig(tokens=100_663_296, batch_size=64, context=1024),
            optimizer=OptimizerConfig(lr=2e-3),
            checkpoint=CheckpointConfig(save_every=200, keep=1),
            log=LogConfig(eval_every=100, eval_rows=128),
        ),
        seeds=3,
        minutes=8.0,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One of the ways to train that are compared. Whatever an arm does not change is the same in all arms."""

    title: str
    schedule: ScheduleConfig  # only its phases differ from those of other arms; rows and positions are the same
    share: float = 1.0  # of A's raw tokens
    optimizer_changes: dict[str, Any] = field(default_factory=dict)
    run_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """The arm's compute as a share of A's, counted in positions."""
        return self.share * cost_of(self.schedule.parsed_phases)

    def record(self) -> dict[str, Any]:
        """The arm's entry in ``experiment.json``. ``changes`` are settings that differ from A's, without phases."""
        counted = {"shares_of": self.schedule.shares_of} if self.schedule.shares_of != ScheduleConfig.shares_of else {}
        changes = {**counted, **self.optimizer_changes, **self.run_changes}
        return {"title": self.title, "phases": self.schedule.phases, "share": self.share, "changes": changes}


def arms(schedule: ScheduleConfig) -> dict[str, Arm]:
    """The arms that have a name. ``schedule`` is that of B. The other arms share its rows and positions."""
    token_level = dataclasses.replace(schedule, phases="1:1")
    superposition = dataclasses.replace(schedule, phases="8:0.3,1:0.7", shares_of="steps")
    falling_sizes = dataclasses.replace(schedule, phases="8:1/3,4:1/6,2:1/6,1:1/3")
    reset = {"optimizer_at_switch": "reset", "lr_scope": "phase"}
    return {
        "A": Arm("token-level, all data", token_level),
        "B": Arm("patches, then token-level", schedule),
        "C": Arm("token-level, B's compute", token_level, share=cost_of(schedule.parsed_phases)),
        "B-reset": Arm("B, optimizer and schedule reset at the switch (PatchTrain)", schedule, optimizer_changes=reset),
        "B-slots-1": Arm("B, slot i weighs 1 / i", schedule, run_changes={"slot_exponent": 1.0}),
        "B-slots-1.25": Arm("B, slot i weighs i^-1.25 (TST)", schedule, run_changes={"slot_exponent": 1.25}),
        "TST": Arm("K = 8, r = 0.3 of the steps (TST)", superposition),
        "multi": Arm("K = 8, 4, 2, 1", falling_sizes),
    }


ARM_NAMES = tuple(arms(ScheduleConfig()))
MAIN_ARMS = ("A", "B", "C")  # every experiment has them


def arm_of_phases(phases: str, schedule: ScheduleConfig) -> Arm:
    """The arm called by its phases, such as ``"8:4/7,1:3/7"``, or ``"1:0.7"``: 0.7 of A's data, token by token.

    Raises:
        ValueError: these are not phases, the last one is not token-level, or the shares add up to more than 1.
    """
    parts = [parse_phase(part) for part in phases.split(",")]
    total = sum(part.share for part in parts)
    if not total <= 1 + 1e-3 or any(part.patch_size < 1 or not part.share > 0 for part in parts):
        raise ValueError(f"phases of an arm need patch sizes of at least 1 and shares of at most 1, got {phases!r}")
    if parts[-1].patch_size != 1:
        raise ValueError(f"the last phase of an arm must be token-level, as in '8:4/7,1:3/7'; got {phases!r}")
    share = 1.0 if total > 1 - 1e-3 else total
    scaled = ",".join(f"{part.patch_size}:{part.share / total!r}" for part in parts)
    title = "" if share == 1.0 else f"{share:g} of the data"
    return Arm(title, dataclasses.replace(schedule, phases=phases if share == 1.0 else scaled), share)


@dataclass(frozen=True)
class ExperimentConfig:
    """Compares patch-level with token-level training on a corpus: training runs ("arms") over the same data.

    A: token by token, all data. B: patches, then token by token. C: token by token at B's compute. The same command
    continues an unfinished experiment.
    """

    out: str = "runs/experiment"
    """The experiment's folder: runs/, results.jsonl, report.md and its figures."""
    budget: str = "cpu"
    """cpu: 25 minutes on 2 cores; gpu: calls of 9 minutes on an H200. The options below replace parts of the budget;
    None leaves a part as it is."""
    arms: tuple[str, ...] = MAIN_ARMS
    """A, B, C, and any of B-reset (optimizer and schedule reset at the switch), B-slots-1 and B-slots-1.25 (slot i of a
    patch weighs i^-1 or i^-1.25), TST (K = 8, r = 0.3), multi (K = 8, 4, 2, 1), and phases, such as 8:4/7,1:3/7, or
    1:0.7 (0.7 of A's data, token by token). Arms can be added to an experiment later, if their patch sizes divide 8 or
    another one in it; finished runs are kept."""
    phases: str = DEFAULT_PHASES
    """B's patch sizes and shares of the data."""
    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = None
    """A preset, a preset with changes, or a JSON file, as in `patchkernels train`."""
    tokens: float | None = None
    """Raw tokens of arm A, rounded down to what all arms can read in whole steps. No token is read twice."""
    batch_size: int | None = None
    """Rows of a step."""
    accumulation: int = 1
    """Number of parts that a step's rows are split into. They are computed one after the other, to save memory."""
    context: int | None = None
    """Positions of a row, in every phase."""
    lr: float | None = None
    """The learning rate that tuning starts from. With --no-tune it is the rate of all runs."""
    tune: bool = True
    """Tune the learning rate on A, B and C: try rates a factor of 2 apart, until the best one lies between two
    others. All arms are compared at A's best rate, and B and C also run at their own."""
    warmup: float = 0.05
    """Share of A's steps over which the learning rate rises. The other arms warm up over the same number of steps."""
    decay: float = 0.2
    """Share of each arm's steps, at the end, over which the learning rate falls to 0."""
    seeds: int | None = None
    """Number of seeds. Each seed gives all arms other initial weights and another order of the text."""
    eval_every: int | None = None
    """Steps between measurements of the validation loss, the points of the report's curves."""
    minutes: float | None = None
    """Save and stop after this many minutes, with exit code 75. The same command then continues the experiment."""
    jobs: int | None = None
    """Runs that are made at the same time, each in a process; they share the threads. None: one run for each thread on
    a CPU, one on a GPU. What each of several runs prints is in its output.txt."""
    compile: bool | None = None
    """Compile the model's layers with torch.compile."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {tuple(BUDGETS)}, got {self.budget!r}")
        unknown = [name for name in self.arms if name not in ARM_NAMES and ":" not in name]
        if unknown or not set(MAIN_ARMS) <= set(self.arms):
            raise ValueError(f"arms must be A, B, C, others of {ARM_NAMES} and phases, got {self.arms}")
        for name in ("tokens", "batch_size", "context", "lr", "seeds", "eval_every", "minutes", "jobs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self._check_phases()

    def check(self) -> None:
        """Raises ``ValueError`` for a preset, a batch size or a warmup that no run of the experiment could have."""
        for name in self.arms:
            self.warmup_of(name)
        self.effective_budget.base.check()

    def _check_phases(self) -> None:
        """Checks that B ends token by token, that an arm has patches, and that a row holds two patches of any size."""
        if self.known_arms["B"].schedule.parsed_phases[-1].patch_size != 1:
            raise ValueError(f"the last phase must be token-level, as in '4:2/3,1:1/3'; got {self.phases!r}")
        if all(phase.patch_size == 1 for phase in self.schedule.parsed_phases):
            raise ValueError(f"B needs a phase of patches, as in '4:2/3,1:1/3'; got {self.phases!r}")
        schedules = [self.known_arms[name].schedule for name in self.arms]
        largest = max(phase.patch_size for schedule in schedules for phase in schedule.parsed_phases)
        context = self.schedule.context
        if context < 2 * largest:
            raise ValueError(f"context must be at least two patches of {largest}, got {context}")

    def warmup_of(self, name: str) -> float:
        """The share of its own steps over which the arm ``name`` warms up: as many steps as in A.

        Raises:
            ValueError: the arm has too few steps for this warmup and the decay.
        """
        warmup = self.warmup / self.known_arms[name].cost
        if not 0 <= warmup <= 1 - self.decay:
            raise ValueError(
                f"{name} cannot warm up over {self.warmup:g} of A's steps, {warmup:g} of its own, and decay over the "
                f"last {self.decay:g}: use a smaller warmup"
            )
        return warmup

    @functools.cached_property
    def schedule(self) -> ScheduleConfig:
        """B's schedule, with the requested number of A's tokens. The corpus may have fewer."""
        return _replaced(
            BUDGETS[self.budget].base.schedule,
            tokens=self.tokens,
            phases=self.phases,
            batch_size=self.batch_size,
            context=self.context,
        )

    @functools.cached_property
    def known_arms(self) -> dict[str, Arm]:
        """All arms by name, also named ones that were not requested."""
        named = arms(self.schedule)
        return named | {name: arm_of_phases(name, self.schedule) for name in self.arms if name not in named}

    @functools.cached_property
    def effective_budget(self) -> Budget:
        """The budget, with the parts replaced for which an option was given."""
        budget = BUDGETS[self.budget]
        base = budget.base
        return Budget(
            dataclasses.replace(
                base,
                run=_replaced(
                    base.run, out=self.out, accumulation=self.accumulation, compile=self.compile, device=self.device
                ),
                data=_replaced(self.data, vocab_size=self.data.vocab_size or base.data.vocab_size),
                model=_replaced(base.model, preset=self.model),
                schedule=self.schedule,
                optimizer=_replaced(base.optimizer, lr=self.lr, warmup=self.warmup, decay=self.decay),
                log=_replaced(base.log, eval_every=self.eval_every),
            ),
            seeds=self.seeds or budget.seeds,
            minutes=self.minutes or budget.minutes,
        )


def _replaced(settings: Settings, **values: Any) -> Settings:
    """A copy of the settings with these values. None stands for an option that was not given: no change."""
    return dataclasses.replace(settings, **{name: value for name, value in values.items() if value is not None})
