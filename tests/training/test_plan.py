"""The command ``plan``: its figures, and bad input."""

from __future__ import annotations

import math

import pytest

from patchkernels.training.config import ModelConfig, ScheduleConfig
from patchkernels.training.plan import PlanConfig, plan


def test_plan():
    schedule = ScheduleConfig(tokens=1e9, batch_size=64, context=1024)
    result = plan(PlanConfig(ModelConfig("124m"), schedule, tflops=100, gpus=2))
    assert [row["patch_size"] for row in result["phases"]] == [4, 1]
    assert result["cost_in_positions"] == pytest.approx(0.5)
    assert result["cost_in_flops"] == pytest.approx(0.5, rel=0.02)
    assert result["hours"] == pytest.approx(result["flops"] / 2e14 / 3600)
    assert result["memory_bytes"]["parameters"] == pytest.approx(4 * 123.6e6, rel=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match="tflops"):
        plan(PlanConfig(tflops=0))
    with pytest.raises(ValueError, match="rows_per_gpu"):
        plan(PlanConfig(rows_per_gpu=0))
    with pytest.raises(ValueError, match="tokens must be positive and finite, got inf"):
        plan(PlanConfig(schedule=ScheduleConfig(tokens=math.inf)))
    with pytest.raises(ValueError, match="plan needs tokens"):
        plan(PlanConfig(schedule=ScheduleConfig()))
    for bad in ({"shards": 3}, {"tensor_parallel": 0}, {"shards": 2, "tensor_parallel": 8}):
        with pytest.raises(ValueError, match="must divide gpus"):
            plan(PlanConfig(ModelConfig("demo"), gpus=8, **bad))
