"""The report and its figures, also of unusual results."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from typing import Any

import pytest
from experiments import chosen_rate, laboratory_of

from patchkernels.experiment.comparison import best_rates, compared_runs, differences, mean_of, rho
from patchkernels.experiment.config import BUDGETS, ExperimentConfig
from patchkernels.experiment.laboratory import experiment
from patchkernels.experiment.report import mean_and_range, write_report


def test_report_and_figures(finished):
    report = (finished / "report.md").read_text()
    results = [json.loads(file.read_text()) for file in finished.glob("runs/*/result.json")]
    groups = compared_runs(results, chosen_rate(finished))
    for arm in ("B", "B-reset", "multi"):
        values = []
        for seed in (0, 1):
            a, b, c = (groups[name][seed]["validation_loss"] for name in ("A", arm, "C"))
            values.append((c - b) / (c - a) if a < c else None)
        assert rho(groups, arm) == dict(enumerate(values))
        defined = [value for value in values if value is not None]
        assert f"ρ of {arm} = (L_C - L_{arm}) / (L_C - L_A) = {mean_and_range(defined)}" in report
    with pytest.raises(ValueError, match="equal compute: TST"):
        rho(groups, "TST")
    assert "ρ of TST" not in report
    for words in (
        "warmup over 2 steps (5% of A's) in every arm", "the best of its own rates, tuned",
        "tokens a parameter", "digest", "Recovery of B", "held out",
        "2 rows of 16 positions in every phase", "| A | 0.0015 ", "AdamW",
    ):  # fmt: skip
        assert words in report
    for name in ("loss.png", "slots.png"):
        assert f"]({name})" in report
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("runs/*/checkpoints"))


def test_arms_with_patches_against_token_level_training_at_equal_compute(config):
    """Of three arms with patches one has the compute of C, one that of 1:0.75, and one that of no other arm."""
    arms = ("A", "B", "C", "2:1/2,1:1/2", "1:0.75", "TST")
    out = experiment(dataclasses.replace(config, arms=arms, tune=False))
    results = [json.loads(file.read_text()) for file in out.glob("runs/*/result.json")]
    tokens = {run["arm"]: run["raw_tokens"] for run in results}
    assert (tokens["2:1/2,1:1/2"], tokens["1:0.75"], tokens["C"]) == (1536, 1152, 768)
    groups = compared_runs(results, BUDGETS["cpu"].base.optimizer.lr)
    report = (out / "report.md").read_text()
    outcome = report.split("## Settings")[0]
    rows = [line for line in outcome.splitlines() if re.match(r"\| (B|TST|2:1/2,1:1/2) \| 0\.\d{3} ", line)]
    assert [row.split(" | ")[0] for row in rows] == ["| TST", "| B", "| 2:1/2,1:1/2"], "in the order of their compute"
    for row, arm, other in ((rows[1], "B", "C"), (rows[2], "2:1/2,1:1/2", "1:0.75")):
        gaps = differences(groups[arm], groups[other])
        assert f"| {other}: " in row and f"| {sum(gaps) / 2:+.4f} ({mean_of(gaps).low:+.4f} to " in row
        assert row.endswith(f"| {mean_of(gaps).p_value:.2g} |")
    assert rows[0].endswith("|  |  |  |")
    assert "](cost.png)" in report and (out / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_long_tables_of_the_recovery_are_thinned(config):
    curve = [
        {**result_of("B", 0, 5.0)["curve"][1], "step": step, "patch_size": 4 if step <= 100 else 1, "flops": step}
        for step in range(1, 2001)
    ]
    run = {**result_of("B", 0, 5.0), "curve": curve}
    table = report_of(config, [run]).split("### Recovery of B")[1].split("## ")[0]
    steps = [int(line.split("|")[1].replace(",", "")) for line in table.splitlines()[4:] if line.startswith("|")]
    assert set(steps) >= {0, 1, 2, 4, 8, 16, 512, 1024, 1900} and steps == sorted(steps)
    assert len(steps) <= 30


def result_of(arm: str, seed: int, loss: float) -> dict[str, Any]:
    point = {"step": 0, "patch_size": 1, "flops": 0, "raw_tokens": 0, "seconds": 0.0, "validation_loss": 9.0}
    flops = 2 if arm == "A" else 1
    last = {"flops": flops, "raw_tokens": 10, "seconds": 1.0, "validation_loss": loss, "validation_bits_per_byte": 1.0}
    return {"arm": arm, "seed": seed, "lr": 1e-3, "steps": 2, "compile_seconds": 0.0, "raw_tokens_per_second": 1.0,
            **last, "curve": [point, {**point, **last, "step": 2}]}  # fmt: skip


def report_of(config: ExperimentConfig, results: list[dict[str, Any]]) -> str:
    laboratory = laboratory_of(config)
    write_report(laboratory.out, laboratory.record, results, 1e-3, finished=True)
    return (laboratory.out / "report.md").read_text()


def test_the_interval_and_the_p_value_of_a_difference(config):
    """Against values that were computed by hand, with t = 4.3027 for 95 % and 2 degrees of freedom."""
    losses = {"A": (4.9, 4.8, 4.85), "B": (5.0, 5.1, 5.05), "C": (5.2, 5.35, 5.15)}
    results = [result_of(arm, seed, loss) for arm, of_arm in losses.items() for seed, loss in enumerate(of_arm)]
    gaps = differences([run for run in results if run["arm"] == "B"], [run for run in results if run["arm"] == "C"])
    assert gaps == pytest.approx([-0.2, -0.25, -0.1])
    mean, error = -0.55 / 3, math.sqrt(statistics.variance(gaps) / 3)
    t = abs(mean) / error
    p_value = 1 - t / math.sqrt(t * t + 2)  # of Student's t with 2 degrees of freedom
    found = mean_of(gaps)
    assert found == pytest.approx((mean, mean - 4.3026527 * error, mean + 4.3026527 * error, p_value), rel=1e-5)
    report = report_of(config, results)
    assert "0.183 better at equal compute (C) (difference -0.373 to +0.006 with 95% confidence, p = 0.053)" in report
    assert "0.200 worse at equal data (A) (difference " in report
    assert mean_of([1.0]) is None


def test_every_arm_at_its_own_best_rate(config):
    """B is best at another rate than A and C, with the first seed."""
    at = {("A", 1e-3): (4.8, 4.9), ("A", 2e-3): (5.0,), ("B", 1e-3): (5.1, 5.2), ("B", 2e-3): (4.9, 5.0),
          ("C", 1e-3): (5.2, 5.4), ("C", 2e-3): (5.3,)}  # fmt: skip
    results = [
        {**result_of(arm, seed, loss), "lr": lr}
        for (arm, lr), of_rate in at.items()
        for seed, loss in enumerate(of_rate)
    ]
    assert best_rates(results) == {"A": 1e-3, "B": 2e-3, "C": 1e-3}
    report = report_of(config, results)
    own = report.split("Each arm at the best of its own rates")[1]
    assert "| B | 0.002 | 2 | 4.9500 (" in own and "| C | 0.001 | 2 | 5.3000 (" in own
    assert "0.350 better at equal compute (C) (difference " in own
    assert "0.150 better at equal compute (C) (difference " in report.split("## Learning rate")[0]
    assert "The best rate of A and B and C is the lowest or highest that was tried." in report


def test_rho_is_undefined_where_more_compute_brought_nothing(config):
    losses = {("A", 0): 5.2, ("B", 0): 5.4, ("C", 0): 5.0, ("A", 1): 5.0, ("B", 1): 5.1, ("C", 1): 5.2}
    results = [result_of(arm, seed, loss) for (arm, seed), loss in losses.items()]
    report = report_of(config, results)
    assert "= 0.500**; by seed: undefined, 0.500." in report and "ρ is undefined where A" in report
    assert "= undefined**; by seed: undefined." in report_of(config, results[:3])


def test_arms_that_diverged_in_different_seeds(config):
    lost = [{"arm": arm, "seed": seed, "lr": 1e-3, "diverged": "step 3"} for arm, seed in (("A", 0), ("B", 1))]
    made = [result_of(arm, seed, 5.0) for arm, seed in (("A", 1), ("B", 0), ("C", 0), ("C", 1))]
    report = report_of(config, [*made, *lost])
    assert "= undefined**; by seed: none." in report
    assert "left out above: A of seed 0, B of seed 1" in report


def test_best_rates_at_the_edge_are_reported(config):
    results = []
    for arm, losses in (("A", (5.1, 5.0, 5.2)), ("B", (5.5, 5.3, 5.4)), ("C", (5.4, 5.3, 5.2))):
        results += [result_of(arm, 0, loss) | {"lr": lr} for lr, loss in zip((5e-4, 1e-3, 2e-3), losses)]
    report = report_of(config, results)
    assert "The best rate of C is the lowest or highest that was tried." in report
    assert "With the first seed ρ is -0.500 there." in report
