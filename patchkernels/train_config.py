"""The settings of a training run, as the command line shows them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkernels.data import DataConfig
from patchkernels.processes import PARALLELS
from patchkernels.schedule import LearningRate, Schedule, parse_phases


@dataclass
class TrainConfig:
    """A two-phase training run. The defaults train the demo model on the standard library's source text."""

    out: str = "runs/demo"
    """The run's folder: checkpoints, log.jsonl, and at the end model/ and plot.png."""
    model: str = "demo"
    """A preset: demo, 42m, 124m, 370m, 780m, 1.3b, 2.7b, 8b, 70b."""
    qk_norm: bool = False
    """QK-norm; what is saved is then a Qwen3 instead of a LLaMA."""
    attention: str = "auto"
    """auto, sdpa, flash2, flash3 or flash4."""
    data: DataConfig = field(default_factory=DataConfig)
    tokens: float | None = None
    """Raw tokens to read in all; None: the corpus once."""
    phases: str = "4:2/3,1:1/3"
    """Patch size and share of each phase, in order."""
    shares_of: str = "data"
    """Shares of the data (PatchTrain's lambda) or of the steps (TST's r)."""
    convention: str = "positions"
    """Constant positions a step (equal FLOPs), or constant raw tokens a step."""
    batch_size: int = 16
    """Rows a step."""
    context: int = 128
    """Positions of a row in the token phase."""
    piece_tokens: int | None = None
    """Raw tokens of the pieces that the text is cut into and shuffled by, a multiple of every phase's row. Runs that
    share it and the seed take the same pieces one after the other, whatever their phases; within a phase rows are
    shuffled. None: the fewest that do."""
    packed_documents: bool = False
    """No patch straddles a document and no position sees another one."""
    lr: float = 1.5e-3
    warmup: float = 0.05
    """Share of the steps."""
    decay: float = 0.1
    """Share of the steps that WSD decays over."""
    lr_shape: str = "wsd"
    """wsd or cosine."""
    lr_scope: str = "run"
    """Over the whole run, or anew in each phase."""
    optimizer_at_switch: str = "carry"
    """carry (TST) or reset (PatchTrain) AdamW's state where the phase changes."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Of matrices."""
    clip: float = 1.0
    """Largest gradient norm."""
    accumulation: int = 1
    """Parts that a step's rows are read in."""
    bf16: bool = False
    """bf16 autocast."""
    compile: bool = False
    """torch.compile; every phase compiles once."""
    activation_checkpointing: bool = False
    device: str = "auto"
    parallel: str = "fsdp"
    """With torchrun: fsdp (FSDP2, parameters and optimizer sharded) or ddp."""
    seed: int = 0
    log_every: int = 20
    eval_every: int = 100
    """Steps. Validation is measured too before the first, where the phase changes, and 1, 2, 4, 8, ... after that."""
    eval_rows: int = 64
    """Rows of held-out text, the same in every phase."""
    save_every: int = 200
    keep: int = 2
    """Checkpoints to keep."""
    minutes: float | None = None
    """Save and stop after so long, with exit code 75; --resume goes on."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "context",
            "accumulation",
            "log_every",
            "eval_every",
            "eval_rows",
            "save_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size, got {self.accumulation} and {self.batch_size}")
        if self.optimizer_at_switch not in ("carry", "reset"):
            raise ValueError(f"optimizer_at_switch must be 'carry' or 'reset', got {self.optimizer_at_switch!r}")
        if self.parallel not in PARALLELS:
            raise ValueError(f"parallel must be one of {PARALLELS}, got {self.parallel!r}")
        text = Path(self.data.path).expanduser() if self.data.path else None
        if text and text.is_dir() and Path(self.out).resolve().is_relative_to(text.resolve()):
            raise ValueError(f"out must not lie within the text that is read, got {self.out!r} and {self.data.path!r}")
        if self.tokens is not None and not 0 < self.tokens < math.inf:
            raise ValueError(f"tokens must be positive and finite, got {self.tokens}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")

    def schedule(self, corpus_tokens: int) -> Schedule:
        """``ValueError`` on phases that cannot be had."""
        phases = parse_phases(self.phases, self.shares_of, self.convention)
        tokens = int(self.tokens or corpus_tokens)
        return Schedule(phases, tokens, self.batch_size, self.context, self.convention, self.piece_tokens)

    def learning_rate(self) -> LearningRate:
        return LearningRate(self.lr, self.warmup, self.decay, self.lr_shape, self.lr_scope)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and its run must share, beside the corpus, which its digest names; where they lie and how
        often the run speaks may change."""
        free = {"out", "resume", "log_every", "eval_every", "eval_rows", "save_every", "keep", "device", "compile",
                "parallel", "minutes"}  # fmt: skip
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        for place in ("path", "tokenizer", "cache_dir"):
            values["data"].pop(place)
        return {key: value for key, value in values.items() if key not in free}
