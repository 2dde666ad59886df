"""A text of random words, the settings of a small experiment, and one that is finished."""

from __future__ import annotations

import pytest
from experiments import evaluated_often, small_experiment
from small_runs import TINY, write_random_text

from patchkernels.experiment.config import ARM_NAMES, BUDGETS
from patchkernels.experiment.laboratory import experiment
from patchkernels.model.config import PRESETS


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(BUDGETS, "cpu", evaluated_often(BUDGETS["cpu"]))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_random_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(text, tmp_path):
    return small_experiment(text, tmp_path / "experiment")


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """The folder of an experiment with all arms, two seeds and tuning. It is made once for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setitem(BUDGETS, "cpu", evaluated_often(BUDGETS["cpu"]))
        return experiment(small_experiment(text, tmp_path_factory.mktemp("out") / "experiment", arms=ARM_NAMES))
