"""Shared by tests of whole runs: a text of random words, a model of a few thousand parameters, small settings."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from patchkernels.data.corpus import DataConfig
from patchkernels.model import PatchLMConfig
from patchkernels.training.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from patchkernels.training.log import read_log

TINY = PatchLMConfig(300, 16, 24, 1, 2, tie_word_embeddings=True)
TIMES = ("seconds", "compile_seconds", "raw_tokens_per_second", "positions_per_second")  # keys of the log


def write_random_text(folder: Path, documents: int = 40, words: int = 150, vocabulary: int = 50) -> Path:
    """``documents`` files of random words out of a ``vocabulary`` of them, the same at every call."""
    generator = random.Random(0)
    known = ["".join(generator.choices("abcdef", k=3)) for _ in range(vocabulary)]
    for number in range(documents):
        (folder / f"{number}.txt").write_text(" ".join(generator.choices(known, k=words)))
    return folder


def data_of(text: Path) -> DataConfig:
    """Settings for ``text``: a vocabulary of 300 tokens, a tenth of the text held out, the cache beside it."""
    cache = str(text.parent / "cache")
    return DataConfig(path=str(text), vocab_size=300, validation_fraction=0.1, cache_dir=cache)


def small_run(text: Path, out: Path) -> TrainConfig:
    """24 steps with the preset "tiny", which the caller adds to the presets; the patch size changes after 8 of them."""
    return TrainConfig(
        run=RunConfig(out=str(out), device="cpu"),
        data=data_of(text),
        model=ModelConfig("tiny"),
        schedule=ScheduleConfig(tokens=1536, phases="4:2/3,1:1/3", batch_size=2, context=16),
        checkpoint=CheckpointConfig(save_every=3),
        log=LogConfig(log_every=1, eval_every=5, eval_rows=4),
    )


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with some settings changed, named without their group: names are unique among all groups."""
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    group_of = {field.name: name for name, group in groups.items() for field in dataclasses.fields(group)}
    for name in {group_of[setting] for setting in changes}:
        changes_of_group = {setting: value for setting, value in changes.items() if group_of[setting] == name}
        groups[name] = dataclasses.replace(groups[name], **changes_of_group)
    return TrainConfig(**groups)


def final_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def untimed_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_log(run / "log.jsonl")]


def assert_same_run(run: Path, expected: Path) -> None:
    """Both logs and both models are the same, bit for bit."""
    assert untimed_log(run) == untimed_log(expected)
    found, weights = final_weights(run), final_weights(expected)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)
