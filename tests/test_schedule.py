"""Phases, steps and learning rate against the published arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchkernels.schedule import LearningRate, Phase, Schedule, parse_phases


def test_published_arithmetic():
    assert Schedule(parse_phases("4:2/3,1:1/3"), 3 * 2**20, 8, 128).cost == pytest.approx(0.5)
    by_steps = parse_phases("4:1/3,1:2/3", "steps")  # TST's r = 1/3 at s = 4 is the same run
    assert [p.share for p in by_steps] == pytest.approx([2 / 3, 1 / 3])
    r, k = 0.3, 6
    (patch, _) = parse_phases(f"{k}:{r},1:{1 - r}", "steps")
    assert patch.share == pytest.approx(r * k / (r * k + 1 - r))
    assert Schedule(parse_phases(f"{k}:{r},1:{1 - r}", "steps"), 10**8, 8, 128).cost == pytest.approx(
        1 / (r * k + 1 - r)
    )


def test_phases_as_pairs():
    expected = parse_phases("4:2/3,1:1/3")
    for pairs in ([(4, 2 / 3), (1, 1 / 3)], ((4, "2/3"), (1, Fraction(1, 3))), [[4, 2 / 3], [1.0, 1 / 3]]):
        assert parse_phases(pairs) == expected
    assert parse_phases([(1, 1)]) == parse_phases("1:1")


def test_shares_of_steps_at_constant_tokens_are_shares_of_data():
    assert parse_phases("4:0.25 1:0.75", "steps", "tokens") == parse_phases("4:0.25 1:0.75")


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    batch=st.integers(1, 5),
    convention=st.sampled_from(["positions", "tokens"]),
)
def test_steps_and_tokens_add_up(sizes, weights, batch, convention):
    shares = [w / sum(weights[: len(sizes)]) for w in weights[: len(sizes)]]
    schedule = Schedule(tuple(Phase(k, s) for k, s in zip(sizes, shares)), 10**6, batch, 16, convention)
    total = 0
    for step in range(0, schedule.total_steps, max(1, schedule.total_steps // 50)):
        index, within = schedule.locate(step)
        assert schedule.starts[index] + within == step
        assert within < schedule.steps[index]
    for phase, steps in zip(schedule.phases, schedule.steps):
        tokens = steps * batch * schedule.row_tokens(phase)
        assert abs(tokens - phase.share * 10**6) <= batch * schedule.row_tokens(phase)
        assert schedule.positions(phase) * phase.patch_size == schedule.row_tokens(phase)
        total += tokens
    assert schedule.raw_tokens(schedule.total_steps) == total
    assert schedule.raw_tokens(0) == 0


def test_equal_positions_or_equal_tokens_a_step():
    phases = parse_phases("4:1/2,1:1/2")
    positions, tokens = (Schedule(phases, 10**6, 2, 64, c) for c in ("positions", "tokens"))
    assert [positions.positions(p) for p in phases] == [64, 64]
    assert [positions.row_tokens(p) for p in phases] == [256, 64]
    assert [tokens.positions(p) for p in phases] == [16, 64]
    assert [tokens.row_tokens(p) for p in phases] == [64, 64]


@pytest.mark.parametrize("shape", ["wsd", "cosine"])
@pytest.mark.parametrize("scope", ["run", "phase"])
def test_learning_rate(shape, scope):
    schedule = Schedule(parse_phases("2:1/2,1:1/2"), 96000, 4, 16)
    rate = LearningRate(1.0, 0.1, 0.1, shape, scope)
    rates = [rate.at(step, schedule) for step in range(schedule.total_steps)]
    assert max(rates) == pytest.approx(1.0)
    assert all(0 < r <= 1 for r in rates)
    switch = schedule.starts[1]
    assert (rates[switch] < 0.1) == (scope == "phase"), "a phase's own schedule warms up anew"
    length = schedule.total_steps if scope == "run" else schedule.steps[0]
    warmup = round(0.1 * length)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[-1] < 0.11
    if shape == "wsd":
        assert rates[warmup : length - round(0.1 * length)] == [1.0] * (length - round(0.1 * length) - warmup)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "got '4'"),
        ("", "got ''"),
        ("0:1", "at least 1"),
        ("4:0.5", r"add up to 1, got 0\.5"),
        ("4:-1,1:2", "positive"),
        ("4:1/0", "4:1/0"),
        ([], r"got \[\]"),
        ([4, 1], "got 4"),
        ([(4, 0.5, 0.5)], r"got \(4, 0.5, 0.5\)"),
        ([(1.5, 1)], r"got \(1.5, 1\)"),
        ([(1, float("nan"))], "nan"),
        ([(1, float("inf"))], "inf"),
        ([(0, 1)], "at least 1"),
    ],
)
def test_nonsense_phases(text, message):
    with pytest.raises(ValueError, match=message):
        parse_phases(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convention": "rows"}, "'rows'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context": 6, "convention": "tokens"}, "divisible by the patch size, got 6 and 4"),
        ({"total_tokens": 10}, "every phase needs one"),
    ],
)
def test_nonsense_schedules(changes, message):
    settings = {"phases": parse_phases("4:2/3,1:1/3"), "total_tokens": 10**5, "batch_size": 2, "context": 16}
    with pytest.raises(ValueError, match=message):
        Schedule(**{**settings, **changes})


def test_nonsense_learning_rates():
    for bad in ({"peak": 0.0}, {"peak": math.inf}, {"warmup": 1.0}, {"shape": "step"}, {"scope": "day"}):
        with pytest.raises(ValueError, match="expected"):
            LearningRate(**{"peak": 1.0, "warmup": 0.1, **bad})
