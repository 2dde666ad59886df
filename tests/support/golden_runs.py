"""Runs of 50 steps whose losses are kept in ``tests/golden``, a JSON file each.

    python tests/support/golden_runs.py     # writes the files anew, for a change that is meant to move the losses

The preset ``demo`` on random words: 25 steps of patches of 4 tokens, then 25 token by token.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from checkout import CHECKOUT
from distributed import run
from small_runs import changed, data_of, write_random_text

from patchkernels.training.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from patchkernels.training.log import read_log
from patchkernels.training.train import train

GOLDEN = CHECKOUT / "tests" / "golden"
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "compiled": {"compile": True},
    "checkpointed": {"activation_checkpointing": True, "accumulation": 2},
    "packed": {"packed_documents": True},
    "two-processes": {},
}


def curve(name: str, text: Path, out: Path) -> dict[str, list[float]]:
    """The training loss of every step of the run of this name, and its validation losses."""
    config = TrainConfig(
        run=RunConfig(out=str(out), device="cpu"),
        data=data_of(text),
        model=ModelConfig("demo"),
        schedule=ScheduleConfig(tokens=32000, phases="4:1/2,1:1/2", shares_of="steps", batch_size=4, context=64),
        checkpoint=CheckpointConfig(save_every=10**6),
        log=LogConfig(log_every=1, eval_every=25, eval_rows=8),
    )
    config = changed(config, **RUNS[name])
    run(train, 2, config) if name == "two-processes" else train(config)
    lines = read_log(out / "log.jsonl")
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "validation_loss")}


def golden_text(folder: Path) -> Path:
    return write_random_text(folder, documents=100, words=300, vocabulary=200)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "text").mkdir()
            losses = curve(name, golden_text(Path(folder) / "text"), Path(folder) / "run")
        (GOLDEN / f"{name}.json").write_text(json.dumps(losses, indent=1) + "\n")
