"""The settings of a training run, grouped by what they belong to.

``train``, ``plan`` and ``experiment`` share these classes. On the command line only the settings of the data carry the
name of their group (``--data.path``); all others are unique without it (``--lr``, ``--phases``).

Groups have a method ``check``, which the settings of the whole command call. If a group checked itself when it is made,
the command line would report the error under an internal name of its parser. What takes more than a look at a value
is checked by :meth:`TrainConfig.check`, before a run does any work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import OmitArgPrefixes, arg

from patchkernels.data.corpus import DataConfig
from patchkernels.model.config import PatchLMConfig
from patchkernels.model.named import named_config
from patchkernels.schedule import DEFAULT_PHASES, OPTIMIZER_AT_SWITCH, LearningRate, Phase, Schedule, parse_phases
from patchkernels.training.processes import PARALLEL_MODES

ENDLESS = 10**15  # tokens of a corpus that no schedule is too long for
MOST_EPOCHS = 1e6
STEEPEST = 10  # slot_exponent: with K = 16 the last slot then weighs 1e-12, and fp32 can still hold it


def check_at_least_one(settings: Any, *names: str) -> None:
    """Raises ``ValueError`` if one of the named settings is no whole number or below 1."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number and at least 1, got {value!r}")


def check_updates(settings: OptimizerConfig | LoopConfig) -> None:
    """Raises ``ValueError`` for an unknown ``optimizer_at_switch`` or a ``clip`` that is not positive."""
    if settings.optimizer_at_switch not in OPTIMIZER_AT_SWITCH:
        raise ValueError(
            f"optimizer_at_switch must be one of {OPTIMIZER_AT_SWITCH}, got {settings.optimizer_at_switch!r}"
        )
    if not isinstance(settings.clip, int | float) or not settings.clip > 0:
        raise ValueError(f"clip must be positive, got {settings.clip}")


def check_minutes(minutes: float | None) -> None:
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")


def check_batch_size(rows: int, parts: int, processes: int = 1) -> None:
    """Raises ``ValueError`` if a step's rows cannot be divided evenly among all processes and their parts."""
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"batch_size must be a whole number and at least 1, got {rows!r}")
    if rows % (processes * parts):
        divisor = "accumulation" if processes == 1 else f"{processes} processes times accumulation"
        raise ValueError(f"batch_size must be divisible by {divisor}, got {rows} and {parts}")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    preset: Annotated[str, arg(name="model")] = "0.4m"
    """A preset (0.4m, demo, 42m, 124m, 370m, 780m, 1.3b, 2.7b, 8b or 70b), a preset with changes
    (demo:hidden_size=64,num_hidden_layers=3), or a JSON file such as a config.json of a LLaMA. The size of the
    vocabulary is that of the data, if there are data."""
    qk_norm: bool = False
    """Normalise queries and keys. The model is then saved as a Qwen3 instead of a LLaMA."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer, and compute the rest again in the backward pass: less memory, more time."""

    def architecture(self, **changes: Any) -> PatchLMConfig:
        """The model with these settings and with ``changes``, which come from the data and the schedule."""
        if self.qk_norm:
            changes["qk_norm"] = True
        return named_config(self.preset, activation_checkpointing=self.activation_checkpointing, **changes)


@dataclass(frozen=True)
class ScheduleConfig:
    """How much text the run reads, in which patch sizes, and how much of it in each step."""

    tokens: float | None = None
    """Raw tokens that the run reads. None: as many as the corpus has, times the epochs."""
    epochs: float = 1.0
    """How many times train reads the corpus, if the tokens are None."""
    phases: str = DEFAULT_PHASES
    """The phases in order, each as patch size:share."""
    shares_of: str = "data"
    """The quantity that the shares divide: data (lambda in PatchTrain) or steps (r in TST)."""
    convention: str = "positions"
    """The quantity that is equal in all steps: positions (every step then costs the same FLOPs) or tokens (raw)."""
    batch_size: int = 8
    """Rows of a step, summed over all processes."""
    context: int = 128
    """Positions of a row in the token phase."""
    piece_tokens: int | None = None
    """Raw tokens of a piece. The text is cut into pieces, which are shuffled. A piece must be a whole number of rows in
    every phase. Runs with the same pieces and seed read the pieces in the same order, whatever their phases are. None:
    the smallest possible piece."""

    def check(self) -> None:
        check_at_least_one(self, "batch_size", "context")
        if self.tokens is not None and not 0 < self.tokens < math.inf:
            raise ValueError(f"tokens must be positive and finite, got {self.tokens}")
        if not 0 < self.epochs <= MOST_EPOCHS:
            raise ValueError(f"epochs must be positive and at most {MOST_EPOCHS:g}, got {self.epochs}")
        if self.tokens is not None and self.epochs != 1.0:
            raise ValueError(f"give tokens or epochs, not both; got {self.tokens:g} and {self.epochs:g}")

    @functools.cached_property
    def parsed_phases(self) -> tuple[Phase, ...]:
        """The phases, each with its share of the data. ``ValueError`` if ``phases`` or ``shares_of`` is invalid."""
        return parse_phases(self.phases, self.shares_of, self.convention)

    def schedule(self, corpus_tokens: int = 0) -> Schedule:
        """The steps of the phases for ``tokens`` raw tokens; if these are None, for ``epochs`` times ``corpus_tokens``.

        Raises:
            ValueError: the phases are invalid, or do not fit these numbers of tokens, rows and positions.
        """
        tokens = int(self.tokens or self.epochs * corpus_tokens)
        return Schedule(
            self.parsed_phases, tokens, self.batch_size, self.context, self.convention, self.piece_tokens or 0
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over the steps."""

    lr: float = 1.5e-3
    """The highest learning rate."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises to its highest value."""
    decay: float = 0.1
    """Share of the steps, at the end, over which the learning rate falls to 0 (wsd only)."""
    lr_shape: str = "wsd"
    """wsd (warmup, constant, linear decay) or cosine."""
    lr_scope: str = "run"
    """run: one curve of the learning rate over the whole run; phase: a new curve in each phase."""
    optimizer_at_switch: str = "carry"
    """AdamW's state when the phase changes: carry (keep it, as TST does) or reset (clear it, as PatchTrain does)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    weight_decay: float = 0.1
    """Weight decay of the matrices. The weights of norms do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters. A gradient of a larger norm is scaled down to it."""

    def check(self) -> None:
        check_updates(self)

    def learning_rate(self) -> LearningRate:
        return LearningRate(self.lr, self.warmup, self.decay, self.lr_shape, self.lr_scope)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and whether it resumes from a checkpoint."""

    save_every: int = 200
    """Steps between checkpoints. The run is also saved when the phase changes and when it stops."""
    keep: int = 2
    """Number of checkpoints that are kept; older ones are removed."""
    resume: bool = False
    """Resume from the newest checkpoint in the run's folder."""

    def check(self) -> None:
        check_at_least_one(self, "save_every", "keep")


@dataclass(frozen=True)
class LogConfig:
    """When the run logs its progress and measures the validation loss."""

    log_every: int = 20
    """Steps between two lines of the log."""
    eval_every: int = 100
    """Steps between measurements of the validation loss. It is also measured before the first step, when the phase
    changes, and 1, 2, 4, 8, ... steps after each change."""
    eval_rows: int = 64
    """Rows of held-out text that the validation loss is measured on, the same in every phase."""

    def check(self) -> None:
        check_at_least_one(self, "log_every", "eval_every", "eval_rows")


@dataclass(frozen=True)
class LoopConfig:
    """How the steps of a run are computed, and when it is saved, logged and evaluated."""

    learning_rate: LearningRate  # its peak is the rate that the optimizer came with, for each group of parameters
    optimizer_at_switch: str
    clip: float
    accumulation: int
    slot_exponent: float
    bf16: bool
    compile: bool  # whether parts of the model are compiled; it is evaluated eagerly
    checkpoint: CheckpointConfig
    log: LogConfig

    def check(self) -> None:
        check_updates(self)
        check_at_least_one(self, "accumulation")
        self.checkpoint.check()
        self.log.check()


@dataclass(frozen=True)
class RunConfig:
    """Where the run is written, and how it is computed."""

    out: str = "runs/demo"
    """The run's folder. It holds config.json, log.jsonl and checkpoints/, and at the end model/ and plot.png."""
    seed: int = 0
    """Seed of the initial weights and of the order in which the text is read."""
    packed_documents: bool = False
    """Keep documents apart: no patch holds tokens of two documents, and no position sees another document."""
    attention: str = "auto"
    """The implementation of attention: auto, sdpa, flash2, flash3 or flash4."""
    accumulation: int = 1
    """Number of parts that a step's rows are split into. They are computed one after the other, to save memory."""
    slot_exponent: float = 0.0
    """In a patch phase the loss is a weighted mean over the K slots: slot i weighs i^-slot_exponent. 0: all alike."""
    bf16: bool | None = None
    """Compute in bf16 under autocast; parameters stay in fp32. None: on a GPU."""
    compile: bool | None = None
    """Compile the model's layers with torch.compile, once if all steps have equal positions. None: on a GPU."""
    device: str = "auto"
    """auto, cpu or cuda."""
    parallel: str = "fsdp"
    """How several processes of torchrun share the model: fsdp (FSDP2 shards parameters and optimizer) or ddp."""
    minutes: float | None = None
    """Save and stop after this many minutes, with exit code 75. --resume then continues the run."""

    def check(self) -> None:
        check_at_least_one(self, "accumulation")
        if self.parallel not in PARALLEL_MODES:
            raise ValueError(f"parallel must be one of {PARALLEL_MODES}, got {self.parallel!r}")
        if not abs(self.slot_exponent) <= STEEPEST:
            raise ValueError(f"slot_exponent must be between -{STEEPEST} and {STEEPEST}, got {self.slot_exponent}")
        check_minutes(self.minutes)


@dataclass(frozen=True)
class TrainConfig:
    """Trains a model in phases. The defaults train the demo model on the source text of Python's standard library."""

    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    schedule: OmitArgPrefixes[ScheduleConfig] = field(default_factory=ScheduleConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    checkpoint: OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    log: OmitArgPrefixes[LogConfig] = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for group in (self.run, self.data, self.schedule, self.optimizer, self.checkpoint, self.log):
            group.check()
        self.check_batch_size()
        text = Path(self.data.path).expanduser() if self.data.path else None
        if text and text.is_dir() and Path(self.run.out).resolve().is_relative_to(text.resolve()):
            raise ValueError(
                f"out must not lie within the text that is read, got {self.run.out!r} and {self.data.path!r}"
            )

    def check(self) -> None:
        """Raises ``ValueError`` for a preset, a learning rate or a schedule that is invalid whatever the corpus is."""
        if "vocab_size" in self.model.preset:
            raise ValueError(
                f"vocab_size is set by --data.vocab-size, not in the model's name; got {self.model.preset!r}"
            )
        self.model.architecture()
        self.optimizer.learning_rate()
        self.schedule.schedule(ENDLESS)

    def on(self, device: torch.device) -> TrainConfig:
        """The same, with the settings decided that depend on the device."""
        gpu, run = device.type == "cuda", self.run
        bf16, compiled = (gpu if setting is None else setting for setting in (run.bf16, run.compile))
        return dataclasses.replace(self, run=dataclasses.replace(run, bf16=bf16, compile=compiled))

    def check_batch_size(self, processes: int = 1) -> None:
        """``ValueError`` if a step's rows cannot be divided evenly among all processes and their parts."""
        check_batch_size(self.schedule.batch_size, self.run.accumulation, processes)

    def loop(self) -> LoopConfig:
        """What the loop over the steps needs to know of these settings."""
        return LoopConfig(
            self.optimizer.learning_rate(),
            self.optimizer.optimizer_at_switch,
            self.optimizer.clip,
            self.run.accumulation,
            self.run.slot_exponent,
            bool(self.run.bf16),
            bool(self.run.compile),
            self.checkpoint,
            self.log,
        )

    def document_multiple(self) -> int:
        """The multiple of tokens that documents are padded to: packed ones then begin with a patch in every phase."""
        sizes = [phase.patch_size for phase in self.schedule.parsed_phases]
        return math.lcm(*sizes) if self.run.packed_documents else 1

    def identity(self) -> dict[str, dict[str, Any]]:
        """The settings that a checkpoint and the run that resumes it must share, by group.

        Settings may change if they only say where files lie, how the run is computed, or how often it logs, evaluates
        and saves. The path of the text may change too, because the corpus's digest is compared instead.
        """
        free = {
            "run": {"out", "device", "compile", "parallel", "accumulation", "minutes"},
            "data": {"path", "tokenizer", "cache_dir"},
        }
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["model"]["preset"] = dataclasses.asdict(named_config(self.model.preset))  # a file may have changed
        return {
            group: {name: value for name, value in settings.items() if name not in free.get(group, set())}
            for group, settings in values.items()
            if group not in ("checkpoint", "log")
        }


def flat_settings(nested: dict[str, Any]) -> dict[str, Any]:
    """The settings of all groups in one dictionary, by their short names, which are unique."""
    flat: dict[str, Any] = {}
    for group, settings in nested.items():
        flat |= settings if isinstance(settings, dict) else {group: settings}
    return flat
