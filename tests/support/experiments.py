"""Shared by tests of experiments: an experiment of a few seconds, and readers of the folder that it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from small_runs import data_of

from patchkernels.data.corpus import prepare
from patchkernels.experiment.config import Budget, ExperimentConfig
from patchkernels.experiment.laboratory import Laboratory

TIMES = ("seconds", "compile_seconds", "raw_tokens_per_second")


def evaluated_often(budget: Budget) -> Budget:
    """The budget, with evaluations and checkpoints that suit runs of a few dozen steps."""
    base = budget.base
    checkpoint = dataclasses.replace(base.checkpoint, save_every=10)
    log = dataclasses.replace(base.log, eval_every=5, eval_rows=4)
    return dataclasses.replace(budget, base=dataclasses.replace(base, checkpoint=checkpoint, log=log))


def small_experiment(text: Path, out: Path, **changes: Any) -> ExperimentConfig:
    """Runs of at most 48 steps with the preset "tiny" on a text of random words."""
    return ExperimentConfig(
        out=str(out), data=data_of(text), tokens=1536, batch_size=2, context=16, seeds=2, device="cpu",
        **{"model": "tiny", "jobs": 1, **changes},
    )  # fmt: skip


def laboratory_of(config: ExperimentConfig) -> Laboratory:
    """The laboratory of an experiment that has run nothing yet and has no deadline."""
    return Laboratory(config, prepare(config.data), math.inf, Console(quiet=True))


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of ``results.jsonl`` whose kind is ``kind``."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def untimed(folder: Path) -> list[dict[str, Any]]:
    """All runs and evaluations without what depends on the clock."""
    kinds = ("run", "evaluation")
    return [{k: v for k, v in line.items() if k not in TIMES} for kind in kinds for line in lines_of(folder, kind)]


def chosen_rate(folder: Path) -> float:
    """The learning rate that the report names as the one used."""
    used = re.search(r"\| A \| (\S+) \(used\)", (folder / "report.md").read_text())
    assert used
    return float(used[1])
