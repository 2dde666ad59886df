"""The settings of an experiment: arms, budgets and bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest

from patchkernels.experiment.config import ARM_NAMES, BUDGETS, ExperimentConfig, arms
from patchkernels.experiment.laboratory import experiment
from patchkernels.training.config import ScheduleConfig, flat_settings


def test_costs_of_the_arms():
    found = {name: arm.cost for name, arm in arms(ScheduleConfig(phases="4:2/3,1:1/3")).items()}
    assert tuple(found) == ARM_NAMES
    expected = {"A": 1, "B": 0.5, "C": 0.5, "B-reset": 0.5, "B-slots-1": 0.5, "B-slots-1.25": 0.5,
                "TST": 1 / (0.3 * 8 + 0.7), "multi": 0.5}  # fmt: skip
    assert found == pytest.approx(expected)


def test_arms_that_are_called_by_their_phases():
    for phases, cost, share in (
        ("8:4/7,1:3/7", 0.5, 1), ("16:8/15,1:7/15", 0.5, 1), ("2:0.9,1:0.1", 0.55, 1), ("1:0.7", 0.7, 0.7),
        ("4:0.2,1:0.3", 0.35, 0.5), ("1:0.999999", 1, 1),
    ):  # fmt: skip
        arm = ExperimentConfig(arms=("A", "B", "C", phases)).known_arms[phases]
        assert (arm.cost, arm.share) == pytest.approx((cost, share)), phases


def test_what_was_asked_for_replaces_parts_of_the_budget():
    asked = {
        "model": "42m",
        "tokens": 1e6,
        "batch_size": 4,
        "context": 64,
        "lr": 1e-4,
        "compile": True,
        "eval_every": 7,
    }
    changed = ExperimentConfig(**asked, seeds=5, minutes=1.5, decay=0.3).effective_budget
    untouched = ExperimentConfig(decay=0.3).effective_budget
    assert (changed.seeds, changed.minutes) == (5, 1.5)
    budget = BUDGETS["cpu"]
    assert (untouched.seeds, untouched.minutes) == (budget.seeds, budget.minutes)
    flat = flat_settings(dataclasses.asdict(changed.base))
    assert {name: flat.get(name, flat["preset"]) for name in asked} == asked
    rest = flat_settings(dataclasses.asdict(untouched.base))
    assert {name for name in flat if flat[name] != rest[name]} == {*asked, "preset"} - {"model"}
    expected = flat_settings(dataclasses.asdict(budget.base)) | {"out": "runs/experiment", "decay": 0.3}
    assert rest == expected


def test_bad_input(config, tmp_path):
    for bad, words in (
        ({"budget": "tpu"}, r"budget must be one of \('cpu', 'gpu'\), got 'tpu'"),
        ({"arms": ("A", "B", "D")}, "arms must be A, B, C, others of .* and phases, got"),
        ({"arms": ("A", "B", "C", "4:2/3,1:1/2")}, "shares of at most 1, got '4:2/3,1:1/2'"),
        ({"arms": ("A", "B", "C", "4:0,1:1")}, "patch sizes of at least 1 and shares of at most 1"),
        ({"arms": ("A", "B", "C", "2:1")}, "last phase of an arm must be token-level"),
        ({"arms": ("A", "B", "C", "1:nan")}, "phases look like"),
        ({"arms": ("A", "B", "C", "0:1")}, "patch sizes of at least 1"),
        ({"arms": ("A", "B", "C", "x:1")}, "phases look like"),
        ({"context": 31, "arms": ("A", "B", "C", "16:8/15,1:7/15")}, "at least two patches of 16, got 31"),
        ({"arms": ("A", "B")}, "arms must be A, B, C"),
        ({"phases": "1:1/3,4:2/3"}, "the last phase must be token-level"),
        ({"phases": "4:2"}, "must add up to 1"),
        ({"phases": "1:1"}, "B needs a phase of patches"),
        ({"phases": "1:1", "arms": ("A", "B", "C", "TST")}, "B needs a phase of patches"),
        ({"context": 7}, "at least two patches of 4, got 7"),
        ({"context": 12, "arms": ("A", "B", "C", "multi")}, "at least two patches of 8, got 12"),
        ({"seeds": 0}, "seeds must be positive and finite, got 0"),
        ({"minutes": -1.0}, "minutes must be positive"),
        ({"tokens": 0.0}, "tokens must be positive"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(config, **bad)
    for bad, words in (
        ({"model": "9b"}, "'9b'"),
        ({"accumulation": 3}, "batch_size must be divisible by accumulation, got 2 and 3"),
        ({"warmup": 0.5}, "B cannot warm up over 0.5 of A's steps, 1 of its own"),
        ({"warmup": math.nan}, "cannot warm up over nan"),
        ({"arms": ("A", "B", "C", "1:0.04")}, "1:0.04 cannot warm up over"),
        ({"decay": 2.0}, "decay over the last 2"),
        ({"out": config.data.path + "/x"}, "must not lie within the text"),
        ({"tokens": 1e9}, r"none is read twice: got 1,000,000,000 of \d"),
        ({"tokens": 700.0}, "700 tokens are fewer than the 768"),
        ({"device": "gpu"}, "'gpu'"),
    ):
        with pytest.raises(ValueError, match=words):
            experiment(dataclasses.replace(config, **{"out": str(tmp_path / "x"), **bad}))
    assert not (tmp_path / "x").exists()
