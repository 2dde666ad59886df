"""A text of random words, and the settings of a run of 24 steps on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import TINY, small_run, write_random_text

from patchkernels.model.config import PRESETS
from patchkernels.training.config import TrainConfig


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return write_random_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(text, tmp_path) -> TrainConfig:
    return small_run(text, tmp_path / "run")
