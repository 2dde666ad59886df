"""The training run: the files that it writes, its options, divergence and bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import TINY, changed, untimed_log
from torch._dynamo.testing import CompileCounterWithBackend

from patchkernels.data.corpus import prepare
from patchkernels.model.cost import count_flops
from patchkernels.model.patch_lm import compiled_layers
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.log import read_log
from patchkernels.training.processes import environment
from patchkernels.training.run import NonFiniteError, Run
from patchkernels.training.stop import StopRequest
from patchkernels.training.train import prepare_run, train


def test_a_run_leaves_model_log_and_plot(config):
    run = train(config)
    start, *lines = read_log(run / "log.jsonl")
    assert (start["step"], start["raw_tokens"], start["flops"]) == (0, 0, 0)
    assert [line["patch_size"] for line in lines] == [4] * 8 + [1] * 16
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[7]["raw_tokens"] == 1024
    assert lines[-1]["raw_tokens"] == 1536
    flops = [count_flops(dataclasses.replace(TINY, vocab_size=300), 2, 16, k) for k in (4, 1)]
    assert lines[-1]["flops"] == 8 * flops[0] + 16 * flops[1]
    evaluated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in evaluated] == [5, 8, 9, 10, 12, 15, 16, 20, 24], "1, 2, 4, 8 after the switch too"
    assert all(len(e.get("validation_slot_losses", [])) == (4 if e["patch_size"] == 4 else 0) for e in evaluated)
    assert abs(lines[0]["loss"] - math.log(300)) < 0.3
    assert evaluated[-1]["validation_loss"] < evaluated[0]["validation_loss"]
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(checkpoints(run / "checkpoints")) == config.checkpoint.keep
    settings = json.loads((run / "config.json").read_text())
    assert settings["schedule"]["phases"] == config.schedule.phases and settings["model"]["preset"] == "tiny"

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("abc def", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "abc def"
    assert model(ids).logits.shape == (1, ids.shape[1], 300)


def test_compiling_is_not_training_time(config, monkeypatch):
    loss, slow = Run.loss, set()

    def first_is_slow(self, ids, labels, documents, patch_size, *args, **kwargs):
        if torch.is_grad_enabled() and patch_size not in slow:
            slow.add(patch_size)
            time.sleep(1.0)
        return loss(self, ids, labels, documents, patch_size, *args, **kwargs)

    monkeypatch.setattr(Run, "loss", first_is_slow)
    last = read_log(train(config) / "log.jsonl")[-1]
    assert slow == {1, 4}
    assert last["compile_seconds"] >= 2.0


def test_reading_results_late_changes_nothing_else(config, monkeypatch):
    """As on a GPU: the log and the model are those of a run that reads each result at once."""
    logs, models = [], []
    for late in (False, True):
        monkeypatch.setattr(Run, "reads_late", late)
        out = f"{config.run.out}-{late}"
        changed = {"run": dataclasses.replace(config.run, out=out), "log": dataclasses.replace(config.log, log_every=7)}
        train(dataclasses.replace(config, **changed))
        logs.append([steady(line) for line in read_log(Path(out) / "log.jsonl")])
        models.append(load_file(Path(out) / "model/model.safetensors"))
    assert logs[0] == logs[1]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def steady(line):
    """The values of a line of the log that do not depend on the clock."""
    return {name: value for name, value in line.items() if "second" not in name}


@pytest.mark.parametrize("late", [False, True])
def test_divergence_stops_the_run_and_the_last_checkpoint_stays(config, monkeypatch, late):
    monkeypatch.setattr(Run, "reads_late", late)
    loss = Run.loss

    def diverging(self, *args, **kwargs):
        return loss(self, *args, **kwargs) * (float("nan") if self.step == 7 else 1)

    monkeypatch.setattr(Run, "loss", diverging)
    with pytest.raises(NonFiniteError, match=r"step 8: loss nan"):
        train(config)
    newest = checkpoints(Path(config.run.out) / "checkpoints")[-1]
    assert newest.name == "step-00000006"
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize(
    "changes",
    [
        {"phases": "2:1/4,4:1/4,1:1/2"},
        {"phases": "1:1/2,4:1/2"},
        {"convention": "tokens", "batch_size": 4},
        {"piece_tokens": 128, "phases": "8:1/2,1:1/2"},
        {"shares_of": "steps"},
        {"packed_documents": True},
        {"lr_shape": "cosine", "lr_scope": "phase"},
        {"bf16": True, "activation_checkpointing": True, "qk_norm": True},
    ],
)
def test_options_train(config, changes):
    run = train(changed(config, **changes))
    lines = read_log(run / "log.jsonl")
    assert lines[-1]["validation_loss"] < math.log(300)


@pytest.mark.parametrize("options", [{}, {"packed_documents": True, "slot_exponent": 1.0}], ids=["plain", "weighted"])
def test_accumulation_changes_nothing_but_rounding(config, tmp_path, options):
    once = train(changed(config, batch_size=4, **options))
    parts = train(changed(config, batch_size=4, accumulation=2, out=str(tmp_path / "parts"), **options))
    for a, b in zip(untimed_log(once)[1:], untimed_log(parts)[1:]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_slots_of_a_patch_weigh_as_the_settings_say(config, exponent):
    settings = changed(config, slot_exponent=exponent)
    run = prepare_run(settings, prepare(settings.data), environment(torch.device("cpu")), StopRequest(None))
    ids = run.read()[0][0]
    for patch_size in (1, 4):
        rows = ids[:, : 16 * patch_size], ids[:, : 16 * patch_size], None
        of_slots = run.loss(*rows, patch_size, "none")[:, :-1].mean((0, 1))  # the last patch has no target
        weight = torch.tensor([i**-exponent for i in range(1, patch_size + 1)])
        expected = (of_slots * weight).sum() / weight.sum()
        torch.testing.assert_close(run.loss(*rows, patch_size), expected, rtol=1e-5, atol=0)


def test_epochs(config):
    """As many tokens as the corpus has, times the epochs, in whole steps."""
    settings = changed(config, tokens=None, epochs=1.5)
    corpus = prepare(settings.data)
    schedule = settings.schedule.schedule(len(corpus.train))
    assert 1.5 * len(corpus.train) == pytest.approx(schedule.raw_tokens(schedule.total_steps), abs=200)
    with pytest.raises(ValueError, match="give tokens or epochs, not both; got 1536 and 2"):
        changed(config, tokens=1536.0, epochs=2.0)
    for epochs in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epochs must be positive and at most 1e\\+06, got"):
            changed(config, tokens=None, epochs=epochs)


def test_compiled_run_is_the_eager_one(config, tmp_path, monkeypatch):
    """One graph serves both patch sizes, so that the switch compiles nothing."""
    compiled_layers.cache_clear()
    graphs, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **o: compiled(model, backend=graphs, **o))
    a = train(config)
    b = train(changed(config, compile=True, out=str(tmp_path / "compiled")))
    assert [x["loss"] for x in untimed_log(a)[1:]] == pytest.approx([x["loss"] for x in untimed_log(b)[1:]], rel=1e-4)
    assert graphs.frame_count == 1
    compiled_layers.cache_clear()


def test_a_folder_that_holds_a_run_or_none(config, tmp_path):
    run = train(config)
    before = [(run / name).read_bytes() for name in ("log.jsonl", "config.json")]
    with pytest.raises(FileExistsError, match="--resume"):
        train(config)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.0015 there, 0.1 here\)"):
        train(changed(config, lr=0.1, resume=True))
    assert [(run / name).read_bytes() for name in ("log.jsonl", "config.json")] == before
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(changed(config, out=str(tmp_path / "other"), resume=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(changed(config, out=str(tmp_path / "file" / "run")))


def test_what_cannot_run_here_raises_before_any_work(config, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'9b'"):
        train(changed(config, preset="9b"))
    with pytest.raises(ValueError, match="the shares must add up to 1"):
        train(changed(config, phases="4:2"))
    with pytest.raises(RuntimeError, match=r"flash2.*cannot run"):
        train(changed(config, attention="flash2"))
    with pytest.raises(ValueError, match="'gpu'"):
        train(changed(config, device="gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        train(changed(config, device="cuda"))
    for variables, message in (
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK must be in \[0, WORLD_SIZE\), got 2 of 2"),
        ({"RANK": "x"}, "must be numbers"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "divisible by 4 processes"),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                train(config)
    assert not Path(config.run.out).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"accumulation": 4},
        {"parallel": "tp"},
        {"optimizer_at_switch": "keep"},
        {"clip": 0.0},
        {"minutes": 0.0},
        {"tokens": math.nan},
        {"tokens": math.inf},
    ],
)
def test_bad_settings(config, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        changed(config, **changes)


def test_the_run_may_not_lie_within_its_text(config):
    with pytest.raises(ValueError, match="out"):
        changed(config, out=config.data.path + "/run")
