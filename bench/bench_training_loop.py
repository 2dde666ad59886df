"""The loop of ``patchkernels train`` beside a plain PyTorch loop over the same model: eager, and compiled.

A call takes ``STEPS`` steps. Reading rows, clipping, AdamW, the learning rate, the log and the display are in it;
evaluation and checkpoints are not, because the plain loop has none.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import OURS, shapes
from bench.compare import Comparison, Group
from bench.conftest import device
from bench.plain_loop import LOG_EVERY, PlainLM, PlainLoop
from bench.replay import replay
from patchkernels import PatchLM
from patchkernels.data.corpus import Corpus, Tokens
from patchkernels.training.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from patchkernels.training.console import Display
from patchkernels.training.log import Log
from patchkernels.training.loop import take_step
from patchkernels.training.processes import Processes
from patchkernels.training.run import Run
from patchkernels.training.stop import StopRequest
from patchkernels.training.train import prepare_run

pytestmark = pytest.mark.benchmark(timer=replay)
PLAIN = "plain loop"
CONTENDERS = (OURS, f"{OURS}, compiled", PLAIN, f"{PLAIN}, compiled")
STEPS = 10  # of a call
_folders = tempfile.TemporaryDirectory()  # of the runs' logs; it is removed when the process ends
MOST_STEPS = 1000  # that the text is long enough for


def groups(scale: str) -> list[Group]:
    return [Group(f"loop-{shape.model}", CONTENDERS, partial(compare_loops, shape)) for shape in shapes.LOOP[scale]]


def compare_loops(shape: shapes.Loop) -> Comparison:
    on = device()
    text = MOST_STEPS * shape.rows * shape.context
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, text).astype(np.uint16)
    steps: dict[str, Callable[[], None]] = {}
    for compiled in (False, True):
        run = our_run(shape, ids, on, compiled)
        plain = PlainLM(run.model.config).to(on)  # type: ignore[arg-type]
        plain.load_state_dict(run.model.state_dict())
        check_loss(run.model, plain, ids, shape, on)
        log, display = Log(run.out / "log.jsonl", 0), Display(run.schedule.total_steps, quiet=True)
        suffix = ", compiled" if compiled else ""
        steps[OURS + suffix] = partial(take_step, run, log, display)
        steps[PLAIN + suffix] = PlainLoop(plain, ids, shape.rows, shape.context, on, compiled).step
    return Comparison(
        operator="training loop",
        case=f"{STEPS} steps",
        shape={"model": shape.model, "V": shape.vocab_size, "rows": shape.rows, "positions": shape.context},
        dtype=torch.bfloat16 if on.type == "cuda" else torch.float32,
        device=on,
        contenders={name: partial(several, steps[name]) for name in CONTENDERS},
        extra={name: {"steps": STEPS} for name in CONTENDERS},
        budget_seconds=30.0,
    )


def several(step: Callable[[], None]) -> list[Tensor]:
    for _ in range(STEPS):
        step()
    return []


def our_run(shape: shapes.Loop, ids: np.ndarray[Any, Any], on: torch.device, compiled: bool) -> Run:
    """A run whose rows come from these ids, and that neither evaluates nor saves within the benchmark."""
    tokens = Tokens(ids, np.array([0]))
    unused: Any = None  # tokenizer and its file: the run is never finished
    corpus = Corpus(tokens, tokens, unused, unused, shape.vocab_size, 0, 1.0, "random", {}, "random")
    config = TrainConfig(
        run=RunConfig(out=tempfile.mkdtemp(dir=_folders.name), compile=compiled, bf16=on.type == "cuda"),
        model=ModelConfig(shape.model),
        schedule=ScheduleConfig(phases="1:1", batch_size=shape.rows, context=shape.context),
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoint=CheckpointConfig(save_every=10**9),
        log=LogConfig(log_every=LOG_EVERY, eval_every=10**9),
    )
    return prepare_run(config, corpus, Processes(on), StopRequest(None))


def check_loss(model: Any, plain: PlainLM, ids: np.ndarray[Any, Any], shape: shapes.Loop, on: torch.device) -> None:
    """``AssertionError`` unless both models have the same loss."""
    assert isinstance(model, PatchLM)
    row = torch.from_numpy(ids[: shape.context + 1].astype(np.int64)).to(on)[None]
    with torch.no_grad():
        expected = plain(row[:, :-1], row[:, 1:])
        longer = PatchLM(dataclasses.replace(model.config, max_position_embeddings=shape.context + 1)).to(on)
        longer.load_state_dict(model.state_dict())
        torch.testing.assert_close(longer(row, row), expected, rtol=1e-4, atol=0)


def test_training_loop(comparison, contender, record):
    record(comparison, contender)
