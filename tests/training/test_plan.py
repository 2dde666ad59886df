"""The command ``plan``: its figures, and bad input."""

from __future__ import annotations

import math

import pytest

from patchkernels.training.config import ModelConfig, ScheduleConfig
from patchkernels.training.evidence import OBSERVATIONS, Observation, nearest, statement
from patchkernels.training.plan import PlanConfig, plan, print_plan


def test_plan():
    schedule = ScheduleConfig(tokens=1e9, batch_size=64, context=1024)
    result = plan(PlanConfig(ModelConfig("124m"), schedule, tflops=100, gpus=2))
    assert [row["patch_size"] for row in result["phases"]] == [4, 1]
    assert result["cost_in_positions"] == pytest.approx(0.5)
    assert result["cost_in_flops"] == pytest.approx(0.5, rel=0.02)
    assert result["hours"] == pytest.approx(result["flops"] / 2e14 / 3600)
    assert result["memory_bytes"]["parameters"] == pytest.approx(4 * 123.6e6, rel=0.01)


def test_a_run_is_compared_with_the_nearest_that_was_made(capsys):
    observations = [(seen.parameters, seen.tokens_per_parameter) for seen in OBSERVATIONS]
    assert all(nearest(*place) == (seen, 0.0) for place, seen in zip(observations, OBSERVATIONS))
    assert len(set(observations)) == len(observations)
    outcomes = [Observation(1, 1, 3, gain, gain - 0.1, gain + 0.1).outcome for gain in (0.2, 0.05, -0.2)]
    assert [words.split()[0] for words in outcomes] == ["won:", "could", "lost:"]
    assert "0.200 nats higher" in outcomes[2] and "0.200 nats lower" in outcomes[0]
    assert "one seed" in Observation(1, 1, 1, 0.2, 0.2, 0.2).outcome

    small = "demo:hidden_size=32,intermediate_size=88,num_hidden_layers=2,num_attention_heads=2,vocab_size=512"
    schedule = ScheduleConfig(tokens=8e5, context=128)
    result = plan(PlanConfig(ModelConfig(small), schedule))
    assert result["parameters"] == 41_632
    assert result["tokens_per_parameter"] == pytest.approx(8e5 / 41_632, rel=0.01)
    print_plan(PlanConfig(ModelConfig(small), schedule))
    words = " ".join(capsys.readouterr().out.split())
    assert "The run reads 19.2 tokens a parameter." in words
    assert "41,632 parameters, 16.5 tokens a parameter) patches lost: they ended 0.148 nats higher (3 seeds" in words
    assert "far from this run" not in words and "PatchTrain" in words
    assert "far from this run" in statement(41_632, 1e5)
    print_plan(PlanConfig(ModelConfig(small), ScheduleConfig(tokens=8e5, context=128, phases="1:1")))
    assert "tokens a parameter" not in capsys.readouterr().out, "a run without patches"


def test_bad_input():
    with pytest.raises(ValueError, match="tflops"):
        plan(PlanConfig(tflops=0))
    with pytest.raises(ValueError, match="rows_per_gpu"):
        plan(PlanConfig(rows_per_gpu=0))
    with pytest.raises(ValueError, match="tokens must be positive and finite, got inf"):
        plan(PlanConfig(schedule=ScheduleConfig(tokens=math.inf)))
    with pytest.raises(ValueError, match="plan counts tokens, not epochs: got epochs=2"):
        plan(PlanConfig(schedule=ScheduleConfig(epochs=2)))
    with pytest.raises(ValueError, match="plan needs tokens"):
        plan(PlanConfig(schedule=ScheduleConfig()))
    for bad in ({"shards": 3}, {"tensor_parallel": 0}, {"shards": 2, "tensor_parallel": 8}):
        with pytest.raises(ValueError, match="must divide gpus"):
            plan(PlanConfig(ModelConfig("demo"), gpus=8, **bad))
