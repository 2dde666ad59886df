"""The experiment: the same data for all arms, what it reports, interruption, and the pitfalls of such comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from patchkernels import experiment as module
from patchkernels import model as model_module
from patchkernels.batches import Batches
from patchkernels.data import DataConfig, Tokens, prepare
from patchkernels.experiment import Laboratory, check_start, experiment
from patchkernels.experiment_config import BUDGETS, NAMES, ExperimentConfig, arms
from patchkernels.experiment_report import compared, rho, write_report
from patchkernels.metrics import read_log
from patchkernels.model import PRESETS, PatchLM, PatchLMConfig
from patchkernels.schedule import parse_phases
from patchkernels.train import OUT_OF_TIME, NonFiniteError, Run, Stopped, check_initial

TINY = PatchLMConfig(300, 16, 24, 1, 2, tie_word_embeddings=True)
TIMES = ("seconds", "compile_seconds", "raw_tokens_per_second")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(BUDGETS, "cpu", dataclasses.replace(BUDGETS["cpu"], eval_every=5, eval_rows=4))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdef", k=3)) for _ in range(50)]
    for i in range(40):
        (root / f"{i}.txt").write_text(" ".join(generator.choices(words, k=150)))
    return root


@pytest.fixture
def config(text, tmp_path):
    data = DataConfig(path=str(text), vocab_size=300, validation_fraction=0.1, cache_dir=str(text.parent / "cache"))
    return ExperimentConfig(
        out=str(tmp_path / "experiment"), data=data, model="tiny", tokens=1536, batch_size=2, context=16, seeds=2,
        device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """All arms, two seeds, tuned: made once, read by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setitem(BUDGETS, "cpu", dataclasses.replace(BUDGETS["cpu"], eval_every=5, eval_rows=4))
        data = DataConfig(path=str(text), vocab_size=300, validation_fraction=0.1, cache_dir=str(text.parent / "cache"))
        return experiment(
            ExperimentConfig(
                out=str(tmp_path_factory.mktemp("out") / "experiment"), data=data, model="tiny", tokens=1536,
                batch_size=2, context=16, seeds=2, device="cpu", arms=NAMES,
            )
        )  # fmt: skip


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def untimed(folder: Path) -> list[dict[str, Any]]:
    kinds = ("run", "evaluation")
    return [{k: v for k, v in line.items() if k not in TIMES} for kind in kinds for line in lines_of(folder, kind)]


def chosen_rate(folder: Path) -> float:
    used = re.search(r"\| A \| (\S+) \(used\)", (folder / "report.md").read_text())
    assert used
    return float(used[1])


def laboratory_of(config: ExperimentConfig) -> Laboratory:
    return Laboratory(config, prepare(config.data), math.inf, Console(quiet=True))


# The data


@pytest.mark.parametrize("phases", ["4:2/3,1:1/3", "2:1/2,1:1/2", "8:1/4,4:1/4,1:1/2"])
def test_arms_read_the_same_tokens(config, tmp_path, phases):
    """A and B the same ones, each once; C the first pieces of them."""
    laboratory = laboratory_of(dataclasses.replace(config, phases=phases, context=16))
    pieces = Tokens(np.arange(len(laboratory.corpus.train), dtype=np.uint32), np.array([0]))
    read = {}
    for name in ("A", "B", "C"):
        schedule = laboratory.train_config(name, 3, 1e-3, tmp_path, 1.0).schedule(0)
        batches = Batches(pieces, schedule, seed=3)
        rows = [batches.batch(step)[0].flatten() for step in range(schedule.total_steps)]
        read[name] = torch.cat(rows).tolist()
        assert len(set(read[name])) == len(read[name]), "no token twice"
    assert set(read["A"]) == set(read["B"])
    size = laboratory.piece_tokens
    permuted = [int(piece) * size for piece in np.random.default_rng([3, 0, 0]).permutation(len(pieces) // size)]
    first = [start + i for start in permuted for i in range(size)][: len(read["C"])]
    assert set(read["C"]) == set(first) < set(read["A"])


def test_costs_of_the_arms():
    def cost(name: str) -> float:
        arm = arms("4:2/3,1:1/3")[name]
        phases = parse_phases(arm.phases, arm.changes.get("shares_of", "data"))
        return arm.share * sum(p.share / p.patch_size for p in phases)

    found = {name: cost(name) for name in NAMES}
    expected = {"A": 1, "B": 0.5, "C": 0.5, "B-reset": 0.5, "TST": 1 / (0.3 * 8 + 0.7), "multi": 0.5}
    assert found == pytest.approx(expected)


# What comes out


def test_every_run_is_that_of_its_arm_and_otherwise_the_same(finished):
    """As its folder has it: the settings, and the learning rate of every step that was logged."""
    settings = {}
    for run in lines_of(finished, "run"):
        folder = finished / "runs" / f"{run['arm']}-seed{run['seed']}-lr{run['lr']:.3g}"
        said = json.loads((folder / "config.json").read_text())
        assert (said.pop("lr"), said.pop("seed")) == (run["lr"], run["seed"])
        assert round(said.pop("warmup") * run["steps"]) == 2, "5 % of A's 48 steps"
        steps = [line for line in read_log(folder / "log.jsonl") if "lr" in line]
        assert max(line["lr"] for line in steps) <= run["lr"]
        assert any(line["lr"] == run["lr"] for line in steps), "constant in between"
        for key in ("out", "minutes", "resume"):
            said.pop(key)
        assert settings.setdefault(run["arm"], said) == said
    expected = {
        "A": ("1:1", 1536, "data", "carry", "run"),
        "B": ("4:2/3,1:1/3", 1536, "data", "carry", "run"),
        "C": ("1:1", 768, "data", "carry", "run"),
        "B-reset": ("4:2/3,1:1/3", 1536, "data", "reset", "phase"),
        "TST": ("8:0.3,1:0.7", 1536, "steps", "carry", "run"),
        "multi": ("8:1/3,4:1/6,2:1/6,1:1/3", 1536, "data", "carry", "run"),
    }
    keys = ("phases", "tokens", "shares_of", "optimizer_at_switch", "lr_scope")
    assert {arm: tuple(said.pop(key) for key in keys) for arm, said in settings.items()} == expected
    assert all(said == settings["A"] for said in settings.values())
    assert settings["A"]["piece_tokens"] == 16 * 8


def test_all_arms_are_run_once_and_at_the_compute_they_should(finished):
    runs = lines_of(finished, "run")
    lr = chosen_rate(finished)
    main = {(run["arm"], run["seed"]): run for run in runs if run["lr"] == lr}
    assert main.keys() == set(itertools.product(NAMES, (0, 1)))
    for arm in ("B", "C"):
        assert {run["lr"] / lr for run in runs if run["arm"] == arm} == {0.5, 1, 2}, "A's best rate and its neighbours"
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


def test_report_and_figures(finished):
    report = (finished / "report.md").read_text()
    results = [json.loads(file.read_text()) for file in finished.glob("runs/*/result.json")]
    groups = compared(results, chosen_rate(finished))
    for arm in ("B", "B-reset", "multi"):
        values = []
        for seed in (0, 1):
            a, b, c = (groups[name][seed]["validation_loss"] for name in ("A", arm, "C"))
            values.append((c - b) / (c - a))
        assert rho(groups, arm) == dict(enumerate(values))
        mean = sum(values) / 2
        assert (
            f"ρ of {arm} = (L_C - L_{arm}) / (L_C - L_A) = {mean:.3f} ({min(values):.3f} to {max(values):.3f})"
            in report
        )
    with pytest.raises(ValueError, match="equal compute: TST"):
        rho(groups, "TST")
    assert "ρ of TST" not in report
    for words in (
        "warmup over 2 steps (5% of A's) in every arm", "best of its own rates", "digest", "Recovery of B", "held out",
        "2 rows of 16 positions in every phase", "| A | 0.0015 ", "AdamW",
    ):  # fmt: skip
        assert words in report
    for name in ("loss.png", "slots.png"):
        assert f"]({name})" in report
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("runs/*/checkpoints"))


def test_finished_runs_are_not_run_again_and_more_may_be_asked_for(config, monkeypatch):
    made = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda c: (made.append(Path(c.out).name), train(c)))
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
    clock = itertools.count(step=1.5)  # every look at it costs 1.5 s of the minutes
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: next(clock))
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


def test_what_is_finished_stays_in_the_report(config):
    experiment(dataclasses.replace(config, seeds=1, arms=("A", "B", "C", "multi")))
    before = {(run["arm"], run["seed"], run["lr"]) for run in lines_of(Path(config.out), "run")}
    assert len(before) >= 9
    for later in ({"arms": NAMES, "seeds": 3, "minutes": 1e-9}, {"seeds": 1}):
        with contextlib.suppress(Stopped):
            experiment(dataclasses.replace(config, **later))
        assert {(run["arm"], run["seed"], run["lr"]) for run in lines_of(Path(config.out), "run")} == before


def test_the_text_may_be_named_otherwise_when_it_goes_on(config, tmp_path, monkeypatch):
    once = dataclasses.replace(config, tune=False, seeds=1)
    with monkeypatch.context() as patch:
        save = Run.train_step
        patch.setattr(Run, "train_step", lambda self, i: (setattr(self, "stop_code", OUT_OF_TIME), save(self, i))[1])
        with pytest.raises(Stopped):
            experiment(once)
    assert list(Path(config.out).glob("runs/A-*/checkpoints/*"))
    link = tmp_path / "elsewhere"
    link.symlink_to(config.data.path)
    experiment(dataclasses.replace(once, data=dataclasses.replace(config.data, path=str(link))))


# Tuning


def test_tuning_goes_on_until_the_best_rate_is_between_two_others(monkeypatch):
    asked = []

    def tuned(best: float) -> float:
        laboratory = object.__new__(Laboratory)
        laboratory.budget = dataclasses.replace(BUDGETS["cpu"], lr=1e-3)
        asked.clear()
        monkeypatch.setattr(
            Laboratory, "end", lambda self, name, seed, lr: (asked.append(lr), abs(math.log(lr / best)))[1]
        )
        return laboratory.tune()

    assert tuned(1e-3) == 1e-3
    assert sorted(asked) == [5e-4, 1e-3, 2e-3]
    assert tuned(4e-3) == 4e-3
    assert sorted(asked) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert tuned(2.5e-4) == 2.5e-4
    assert sorted(asked) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3]
    assert tuned(1.0) == 8e-3, "no more than five"


def test_a_rate_at_which_a_run_diverges_is_not_chosen(config, monkeypatch):
    train = module.train

    def diverging(c):
        if c.lr > BUDGETS["cpu"].lr:
            Path(c.out).mkdir(parents=True, exist_ok=True)
            raise NonFiniteError("step 3: loss nan")
        return train(c)

    monkeypatch.setattr(module, "train", diverging)
    out = experiment(dataclasses.replace(config, seeds=1))
    assert chosen_rate(out) <= BUDGETS["cpu"].lr
    assert "diverged" in (out / "report.md").read_text()
    assert any("diverged" in run for run in lines_of(out, "run"))


def test_an_arm_that_diverges_at_the_chosen_rate_is_said_to(config, monkeypatch):
    train = module.train

    def diverging(c):
        if Path(c.out).name.startswith("B-seed1"):
            raise NonFiniteError("step 3: loss nan")
        return train(c)

    monkeypatch.setattr(module, "train", diverging)
    (Path(config.out) / "runs" / f"B-seed1-lr{BUDGETS['cpu'].lr:.3g}").mkdir(parents=True)
    out = experiment(dataclasses.replace(config, tune=False))
    report = (out / "report.md").read_text()
    assert "left out above: B of seed 1" in report and "ρ of B" in report
    monkeypatch.setattr(Laboratory, "end", lambda *_: math.inf)
    with pytest.raises(NonFiniteError, match="A diverged at every learning rate"):
        experiment(dataclasses.replace(config, out=config.out + "-2"))
    assert "unfinished" in (Path(config.out + "-2") / "report.md").read_text()


# The pitfalls


def test_what_was_trained_on_never_enters_the_comparison(config, monkeypatch):
    """A patch phase's own loss is of another kind: the log is full of a recognisable one, the results hold none."""
    step = Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda self, index: step(self, index) | {"loss": 123.456})
    out = experiment(dataclasses.replace(config, tune=False, seeds=1))
    assert "123.456" in (out / "runs" / f"B-seed0-lr{BUDGETS['cpu'].lr:.3g}" / "log.jsonl").read_text()
    assert "123.456" not in (out / "results.jsonl").read_text() + (out / "report.md").read_text()


def test_losing_all_but_one_target_is_found(config, monkeypatch):
    """The loss goes down all the same: only its value at the start tells."""
    targets = model_module.patch_targets

    def first_alone(labels, patch_size, document_ids):
        target = targets(labels, patch_size, document_ids)
        return (
            target.masked_fill(torch.arange(patch_size, device=target.device) > 0, -100) if patch_size > 1 else target
        )

    once = dataclasses.replace(config, tune=False, seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "patch_targets", first_alone)
        with pytest.raises(RuntimeError, match=r"before the first step the loss at K = 4 .*targets are lost"):
            experiment(once)
    experiment(once)  # nothing of it is left when it is mended


def test_a_loss_summed_over_slots_is_found(config, monkeypatch):
    loss = Run.loss

    def summed(self, ids, labels, documents, patch_size, reduction="mean", compiled=True):
        value = loss(self, ids, labels, documents, patch_size, reduction, compiled)
        return value * patch_size if reduction == "mean" else value

    monkeypatch.setattr(Run, "loss", summed)
    with pytest.raises(RuntimeError, match=r"before the first step the loss at K = 4 .*targets are lost"):
        experiment(dataclasses.replace(config, tune=False, seeds=1))


def test_arms_that_see_other_validation_tokens_are_found(config, monkeypatch):
    configure = Laboratory.train_config

    def other(self, name, *args):
        found = configure(self, name, *args)
        return dataclasses.replace(found, eval_rows=2) if name == "B" else found

    monkeypatch.setattr(Laboratory, "train_config", other)
    with pytest.raises(RuntimeError, match=r"arm B, seed 0 starts at .*: not the same weights or validation text"):
        experiment(dataclasses.replace(config, tune=False, seeds=1))


def test_check_start():
    def run(arm: str, start: float, seed: int = 0) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "curve": [{"validation_loss": start}]}

    there = [run("A", 5.71), run("A", 5.72, seed=1), {"arm": "A", "seed": 0, "diverged": "step 3"}]
    check_start(run("B", 5.71), there, Path("b"))
    with pytest.raises(RuntimeError, match=r"not the same weights or validation text. Remove c once"):
        check_start(run("C", 5.712), there, Path("c"))


def test_check_initial():
    def initial(slots: list[float], mean: float = 5.7) -> dict[str, Any]:
        return {"initial_losses": {"1": 5.71, "4": mean}, "initial_slot_losses": {"1": [5.71], "4": slots}}

    check_initial(initial([5.69, 5.7, 5.71, 5.72]), 300, 0.0)
    for bad in (initial([5.7, 0.0, 0.0, 0.0]), initial([5.7 / 4] * 4), initial([5.7] * 4, 5.7 / 4)):
        with pytest.raises(RuntimeError, match=r"K = 4 .* log V is 5.704: targets are lost"):
            check_initial(bad, 300, 0.0)


def test_wide_models_begin_above_log_v():
    """At D = 2048 by 0.41: the logits of a new model vary."""
    torch.manual_seed(0)
    wide = PatchLM(PatchLMConfig(1000, 2048, 64, 1, 16, tie_word_embeddings=True))
    ids = torch.randint(1000, (4, 64))
    with torch.no_grad():
        losses = {str(k): float(wide(ids, ids, k)) for k in (1, 4)}
    values = {"initial_losses": losses, "initial_slot_losses": {k: [loss] for k, loss in losses.items()}}
    check_initial(values, 1000, 2048 * wide.config.initializer_range**2)
    with pytest.raises(RuntimeError, match="targets are lost"):
        check_initial(values, 1000, 0.0)


# Bad input


def test_bad_input(config, tmp_path):
    for bad, words in (
        ({"budget": "tpu"}, r"budget must be one of \('cpu', 'gpu'\), got 'tpu'"),
        ({"arms": ("A", "B", "D")}, "arms must be A, B, C and others of"),
        ({"arms": ("A", "B")}, "arms must be A, B, C"),
        ({"phases": "1:1/3,4:2/3"}, "the last phase must be token-level"),
        ({"phases": "4:2"}, "must add up to 1"),
        ({"phases": "1:1"}, "B needs a phase of patches"),
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
        ({"tokens": 1e9}, r"none is read twice: got 1,000,000,000 of \d"),
        ({"tokens": 700.0}, "700 tokens are fewer than the 768"),
        ({"model": "9b"}, "'9b'"),
        ({"device": "gpu"}, "'gpu'"),
        ({"accumulation": 3}, "accumulation must divide batch_size"),
        ({"warmup": 0.5}, "B cannot warm up over 0.5 of A's steps, 1 of its own"),
        ({"warmup": math.nan}, "cannot warm up over nan"),
        ({"decay": 2.0}, "decay over the last 2"),
        ({"out": config.data.path + "/x"}, "must not lie within the text"),
    ):
        with pytest.raises(ValueError, match=words):
            experiment(dataclasses.replace(config, **{"tokens": 1536.0, "out": str(tmp_path / "x"), **bad}))
    assert not (tmp_path / "x").exists()


def test_not_under_torchrun(config, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="runs in one process"):
        experiment(config)
    assert not Path(config.out).exists()


def test_a_folder_of_another_experiment_is_left_alone(config):
    once = dataclasses.replace(config, tune=False, seeds=1)
    out = experiment(once)
    before = {name: (out / name).read_bytes() for name in ("experiment.json", "results.jsonl", "report.md")}
    for change in ({"warmup": 0.2}, {"phases": "2:1/2,1:1/2"}, {"tokens": 3072.0}):
        with pytest.raises(ValueError, match=rf"holds another experiment .*{next(iter(change))}"):
            experiment(dataclasses.replace(once, **change))
    assert before == {name: (out / name).read_bytes() for name in before}


@pytest.mark.parametrize("name", ["experiment.json", "result.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_results_are_named(config, name, content):
    once = dataclasses.replace(config, tune=False, seeds=1)
    file = next(experiment(once).rglob(name))
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} is damaged .*: remove it"):
        experiment(once)
    file.unlink()
    experiment(once)


def test_decimal_shares_are_the_fractions_they_stand_for(config):
    assert laboratory_of(dataclasses.replace(config, phases="4:0.667,1:0.333")).tokens == 1536


# Reports of unusual results


def result_of(arm: str, seed: int, loss: float) -> dict[str, Any]:
    point = {"step": 0, "patch_size": 1, "flops": 0, "raw_tokens": 0, "seconds": 0.0, "validation_loss": 9.0}
    flops = 2 if arm == "A" else 1
    last = {"flops": flops, "raw_tokens": 10, "seconds": 1.0, "validation_loss": loss, "validation_bits_per_byte": 1.0}
    return {"arm": arm, "seed": seed, "lr": 1e-3, "steps": 2, "compile_seconds": 0.0, "raw_tokens_per_second": 1.0,
            **last, "curve": [point, {**point, **last, "step": 2}]}  # fmt: skip


def report_of(config: ExperimentConfig, results: list[dict[str, Any]]) -> str:
    laboratory = laboratory_of(config)
    write_report(laboratory.out, laboratory.settings, results, 1e-3, finished=True)
    return (laboratory.out / "report.md").read_text()


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


def test_best_rates_at_the_edge_are_said_to_be(config):
    results = []
    for arm, losses in (("A", (5.1, 5.0, 5.2)), ("B", (5.5, 5.3, 5.4)), ("C", (5.4, 5.3, 5.2))):
        results += [result_of(arm, 0, loss) | {"lr": lr} for lr, loss in zip((5e-4, 1e-3, 2e-3), losses)]
    report = report_of(config, results)
    assert "and ρ = -0.500. The best of C is the lowest or highest that was tried." in report


def test_the_commit_is_that_of_the_checkout_itself(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@y.z")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "--quiet", "--message", "x")
    file = tmp_path / "experiment.py"
    file.write_text("")
    monkeypatch.setattr(module, "__file__", str(file))
    assert module._commit() is None, "installed below a repository of something else"
    git("add", file.name)
    git("commit", "--quiet", "--message", "y")
    assert module._commit() == git("rev-parse", "--short=10", "HEAD")
    file.write_text("changed")
    assert module._commit() == git("rev-parse", "--short=10", "HEAD") + "-dirty"
