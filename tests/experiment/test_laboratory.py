"""The runs of an experiment: equal data for all arms, no run made twice, tuning, and interruptions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import chosen_rate, laboratory_of, lines_of, untimed

from patchkernels.data.batches import Batches
from patchkernels.data.corpus import Tokens
from patchkernels.experiment import laboratory as laboratory_module
from patchkernels.experiment.config import ARM_NAMES, BUDGETS
from patchkernels.experiment.laboratory import Laboratory, experiment
from patchkernels.training.config import OptimizerConfig
from patchkernels.training.log import read_log
from patchkernels.training.run import NonFiniteError
from patchkernels.training.stop import OUT_OF_TIME, Stopped

LR = BUDGETS["cpu"].base.optimizer.lr


@pytest.mark.parametrize("phases", ["4:2/3,1:1/3", "2:1/2,1:1/2", "8:1/4,4:1/4,1:1/2"])
def test_arms_read_the_same_tokens(config, tmp_path, phases):
    """A and B read the same tokens, each of them once. C reads the first pieces of these."""
    laboratory = laboratory_of(dataclasses.replace(config, phases=phases, context=16))
    pieces = Tokens(np.arange(len(laboratory.corpus.train), dtype=np.uint32), np.array([0]))
    read = {}
    for name in ("A", "B", "C"):
        schedule = laboratory.train_config(name, 3, 1e-3, tmp_path, 1.0).schedule.schedule()
        batches = Batches(pieces, schedule, seed=3)
        rows = [batches.batch(step)[0].flatten() for step in range(schedule.total_steps)]
        read[name] = torch.cat(rows).tolist()
        assert len(set(read[name])) == len(read[name]), "no token twice"
    assert set(read["A"]) == set(read["B"])
    size = laboratory.piece_tokens
    permuted = [int(piece) * size for piece in np.random.default_rng([3, 0, 0]).permutation(len(pieces) // size)]
    first = [start + i for start in permuted for i in range(size)][: len(read["C"])]
    assert set(read["C"]) == set(first) < set(read["A"])


def test_decimal_shares_are_the_fractions_they_stand_for(config):
    assert laboratory_of(dataclasses.replace(config, phases="4:0.667,1:0.333")).tokens == 1536


def test_every_run_is_that_of_its_arm_and_otherwise_the_same(finished):
    """Checks the settings in each run's folder, and the learning rate of every logged step."""
    of_arms = {}
    for run in lines_of(finished, "run"):
        folder = finished / "runs" / f"{run['arm']}-seed{run['seed']}-lr{run['lr']:.3g}"
        settings = json.loads((folder / "config.json").read_text())
        assert (settings["optimizer"].pop("lr"), settings["run"].pop("seed")) == (run["lr"], run["seed"])
        assert round(settings["optimizer"].pop("warmup") * run["steps"]) == 2, "5 % of A's 48 steps"
        steps = [line for line in read_log(folder / "log.jsonl") if "lr" in line]
        assert max(line["lr"] for line in steps) <= run["lr"]
        assert any(line["lr"] == run["lr"] for line in steps), "constant in between"
        for group, key in (("run", "out"), ("run", "minutes"), ("checkpoint", "resume")):
            settings[group].pop(key)
        assert of_arms.setdefault(run["arm"], settings) == settings
    expected = {
        "A": ("1:1", 1536, "data", "carry", "run"),
        "B": ("4:2/3,1:1/3", 1536, "data", "carry", "run"),
        "C": ("1:1", 768, "data", "carry", "run"),
        "B-reset": ("4:2/3,1:1/3", 1536, "data", "reset", "phase"),
        "B-slots-1": ("4:2/3,1:1/3", 1536, "data", "carry", "run"),
        "B-slots-1.25": ("4:2/3,1:1/3", 1536, "data", "carry", "run"),
        "TST": ("8:0.3,1:0.7", 1536, "steps", "carry", "run"),
        "multi": ("8:1/3,4:1/6,2:1/6,1:1/3", 1536, "data", "carry", "run"),
    }
    keys = (("schedule", "phases"), ("schedule", "tokens"), ("schedule", "shares_of"),
            ("optimizer", "optimizer_at_switch"), ("optimizer", "lr_scope"))  # fmt: skip
    found = {arm: tuple(settings[group].pop(key) for group, key in keys) for arm, settings in of_arms.items()}
    assert found == expected
    exponents = {arm: settings["run"].pop("slot_exponent") for arm, settings in of_arms.items()}
    assert exponents == dict.fromkeys(expected, 0.0) | {"B-slots-1": 1.0, "B-slots-1.25": 1.25}
    assert all(settings == of_arms["A"] for settings in of_arms.values())
    assert of_arms["A"]["schedule"]["piece_tokens"] == 16 * 8


def test_all_arms_are_run_once_and_at_the_compute_they_should(finished):
    runs = lines_of(finished, "run")
    lr = chosen_rate(finished)
    main = {(run["arm"], run["seed"]): run for run in runs if run["lr"] == lr}
    assert main.keys() == set(itertools.product(ARM_NAMES, (0, 1)))
    for arm in ("B", "C"):
        tried = {run["lr"] / lr: run["validation_loss"] for run in runs if run["arm"] == arm and run["seed"] == 0}
        best = min(tried, key=tried.get)
        assert {rate * LR / lr for rate in (0.5, 1, 2)} | {1} <= set(tried), "the first three, and A's best rate"
        assert len(tried) >= 5 or min(tried) < best < max(tried)
        assert {run["seed"] for run in runs if run["arm"] == arm and run["lr"] == best * lr} == {0, 1}
    assert len({run["lr"] for run in runs if run["arm"] == "A"}) >= 3
    flops = {arm: run["flops"] / main["A", 0]["flops"] for (arm, seed), run in main.items() if seed == 0}
    assert flops["B"] == flops["C"] == flops["B-reset"] == flops["multi"] == 0.5
    assert flops["TST"] == pytest.approx(0.32, abs=0.03)
    tokens = {arm: run["raw_tokens"] for (arm, seed), run in main.items() if seed == 0}
    assert tokens["A"] == tokens["B"] == tokens["multi"] == 1536
    assert tokens["C"] == 768
    for run in main.values():
        assert run["validation_bits_per_byte"] > 0
        assert run["raw_tokens_per_second"] == pytest.approx(run["raw_tokens"] / run["seconds"])


def test_every_arm_of_a_seed_starts_from_the_same_weights(finished):
    starts: dict[int, set[float]] = {0: set(), 1: set()}
    for point in lines_of(finished, "evaluation"):
        if point["step"] == 0:
            starts[point["seed"]].add(point["validation_loss"])
    assert [len(found) for found in starts.values()] == [1, 1]
    assert starts[0] != starts[1], "seeds differ"


def test_the_recovery_is_followed_step_by_step(finished):
    lr = chosen_rate(finished)
    points = [e for e in lines_of(finished, "evaluation") if (e["arm"], e["seed"], e["lr"]) == ("B", 0, lr)]
    assert [p["step"] for p in points] == [0, 5, 8, 9, 10, 12, 15, 16, 20, 24]
    assert all(len(p["validation_slot_losses"]) == 4 for p in points if p["patch_size"] == 4)


def test_finished_runs_are_not_run_again_and_more_may_be_asked_for(config, monkeypatch):
    made = []
    train = laboratory_module.train
    monkeypatch.setattr(laboratory_module, "train", lambda c: (made.append(Path(c.run.out).name), train(c)))
    once = dataclasses.replace(config, tune=False, seeds=1)
    experiment(once)
    assert [name.split("-lr")[0] for name in made] == ["A-seed0", "B-seed0", "C-seed0"]
    before = untimed(Path(config.out))
    made.clear()
    experiment(once)
    assert made == []
    assert untimed(Path(config.out)) == before
    experiment(dataclasses.replace(once, arms=("A", "B", "C", "multi"), seeds=2))
    assert [name.split("-lr")[0] for name in made] == ["multi-seed0", "A-seed1", "B-seed1", "C-seed1", "multi-seed1"]


def test_interrupted_it_goes_on_as_if_nothing_had_happened(config, tmp_path, monkeypatch):
    straight = experiment(dataclasses.replace(config, out=str(tmp_path / "straight")))
    read, count = Batches.batch, itertools.count()

    def batch(self, at):
        if next(count) in (13, 60, 110, 111):
            raise KeyboardInterrupt
        return read(self, at)

    monkeypatch.setattr(Batches, "batch", batch)
    interrupted = 0
    while True:
        try:
            experiment(config)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 4
    assert untimed(Path(config.out)) == untimed(straight)


def test_out_of_time_it_stops_with_a_report_and_goes_on(config, monkeypatch):
    clock = itertools.count(step=1.5)  # each time it is read, 1.5 s of the minutes have passed
    with monkeypatch.context() as patch:
        patch.setattr(laboratory_module.time, "monotonic", lambda: next(clock))
        codes = []
        while True:
            try:
                experiment(dataclasses.replace(config, seeds=1, minutes=1.0))
                break
            except Stopped as stopped:
                codes.append(stopped.code)
            assert "unfinished" in (Path(config.out) / "report.md").read_text()
            assert not lines_of(Path(config.out), "experiment")[0]["finished"]
    assert set(codes) == {OUT_OF_TIME} and len(codes) > 2
    report = (Path(config.out) / "report.md").read_text()
    assert "unfinished" not in report and "ρ of B" in report


def test_not_under_torchrun(config, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="runs in one process"):
        experiment(config)
    assert not Path(config.out).exists()


def test_tuning_goes_on_until_the_best_rate_is_between_two_others(monkeypatch):
    asked = {}

    def tuned(**best: float) -> dict[str, float]:
        laboratory = object.__new__(Laboratory)
        laboratory.budget = dataclasses.replace(
            BUDGETS["cpu"], base=dataclasses.replace(BUDGETS["cpu"].base, optimizer=OptimizerConfig(lr=1e-3))
        )
        asked.clear()
        monkeypatch.setattr(Laboratory, "make", lambda self, wanted: None)

        def final_loss(self: Laboratory, name: str, seed: int, lr: float) -> float:
            asked.setdefault(name, set()).add(lr)
            return abs(math.log(lr / best[name]))

        monkeypatch.setattr(Laboratory, "final_loss", final_loss)
        return laboratory.tune(1e-3)

    assert tuned(A=1e-3, B=4e-3, C=2.5e-4) == {"A": 1e-3, "B": 4e-3, "C": 2.5e-4}
    assert asked == {
        "A": {5e-4, 1e-3, 2e-3},
        "B": {5e-4, 1e-3, 2e-3, 4e-3, 8e-3},
        "C": {1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3},
    }
    assert tuned(A=1.0, B=1e-3, C=1e-3)["A"] == 8e-3, "no more than five"


def test_a_rate_at_which_a_run_diverges_is_not_chosen(config, monkeypatch):
    train = laboratory_module.train

    def diverging(c):
        if c.optimizer.lr > LR:
            Path(c.run.out).mkdir(parents=True, exist_ok=True)
            raise NonFiniteError("step 3: loss nan")
        return train(c)

    monkeypatch.setattr(laboratory_module, "train", diverging)
    out = experiment(dataclasses.replace(config, seeds=1))
    assert chosen_rate(out) <= LR
    assert "diverged" in (out / "report.md").read_text()
    assert any("diverged" in run for run in lines_of(out, "run"))


def test_an_arm_that_diverges_at_the_chosen_rate_is_reported(config, monkeypatch):
    train = laboratory_module.train

    def diverging(c):
        if Path(c.run.out).name.startswith("B-seed1"):
            raise NonFiniteError("step 3: loss nan")
        return train(c)

    monkeypatch.setattr(laboratory_module, "train", diverging)
    (Path(config.out) / "runs" / f"B-seed1-lr{LR:.3g}").mkdir(parents=True)
    out = experiment(dataclasses.replace(config, tune=False))
    report = (out / "report.md").read_text()
    assert "left out above: B of seed 1" in report and "ρ of B" in report
    monkeypatch.setattr(Laboratory, "final_loss", lambda *_: math.inf)
    with pytest.raises(NonFiniteError, match="A diverged at every learning rate"):
        experiment(dataclasses.replace(config, out=config.out + "-2"))
    assert "unfinished" in (Path(config.out + "-2") / "report.md").read_text()
