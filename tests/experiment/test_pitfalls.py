"""Mistakes that would spoil the comparison are found while the experiment runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkernels.experiment.config import BUDGETS
from patchkernels.experiment.laboratory import Laboratory, check_start, experiment
from patchkernels.model import patch_lm
from patchkernels.model.config import PatchLMConfig
from patchkernels.model.patch_lm import PatchLM
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.training.evaluation import check_initial
from patchkernels.training.run import Run


def test_what_was_trained_on_never_enters_the_comparison(config, monkeypatch):
    """The training loss of a patch phase is not comparable. A marked one in the log must not reach the results."""
    result = Run.result
    monkeypatch.setattr(Run, "result", lambda self: result(self) | {"loss": 123.456})
    out = experiment(dataclasses.replace(config, tune=False, seeds=1))
    assert "123.456" in (out / "runs" / f"B-seed0-lr{BUDGETS['cpu'].base.optimizer.lr:.3g}" / "log.jsonl").read_text()
    assert "123.456" not in (out / "results.jsonl").read_text() + (out / "report.md").read_text()


def test_losing_all_but_one_target_is_found(config, monkeypatch):
    """During training the loss falls as it should. Only its value at the start shows that targets are missing."""
    targets = patch_lm.patch_targets

    def first_alone(labels, patch_size, document_ids):
        target = targets(labels, patch_size, document_ids)
        return (
            target.masked_fill(torch.arange(patch_size, device=target.device) > 0, IGNORE_INDEX)
            if patch_size > 1
            else target
        )

    once = dataclasses.replace(config, tune=False, seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(patch_lm, "patch_targets", first_alone)
        with pytest.raises(RuntimeError, match=r"before the first step the loss at K = 4 .*targets are lost"):
            experiment(once)
    experiment(once)  # once the mistake is corrected, nothing of it is left


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
        return dataclasses.replace(found, log=dataclasses.replace(found.log, eval_rows=2)) if name == "B" else found

    monkeypatch.setattr(Laboratory, "train_config", other)
    with pytest.raises(RuntimeError, match=r"arm B, seed 0 starts at .*: not the same weights or validation text"):
        experiment(dataclasses.replace(config, tune=False, seeds=1))


def test_check_start():
    def run(arm: str, start: float, seed: int = 0) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "curve": [{"validation_loss": start}]}

    others = [run("A", 5.71), run("A", 5.72, seed=1), {"arm": "A", "seed": 0, "diverged": "step 3"}]
    check_start(run("B", 5.71), others, Path("b"))
    with pytest.raises(RuntimeError, match=r"not the same weights or validation text. Remove c once"):
        check_start(run("C", 5.712), others, Path("c"))


def test_check_initial():
    def initial(slots: list[float], mean: float = 5.7) -> dict[str, Any]:
        return {"initial_losses": {"1": 5.71, "4": mean}, "initial_slot_losses": {"1": [5.71], "4": slots}}

    check_initial(initial([5.69, 5.7, 5.71, 5.72]), 300, 0.0)
    for bad in (initial([5.7, 0.0, 0.0, 0.0]), initial([5.7 / 4] * 4), initial([5.7] * 4, 5.7 / 4)):
        with pytest.raises(RuntimeError, match=r"K = 4 .* log V is 5.704: targets are lost"):
            check_initial(bad, 300, 0.0)


def test_wide_models_begin_above_log_v():
    """At D = 2048 the logits of a new model have a variance of 0.82, so that its loss is log V + 0.41."""
    torch.manual_seed(0)
    wide = PatchLM(PatchLMConfig(1000, 2048, 64, 1, 16, tie_word_embeddings=True))
    ids = torch.randint(1000, (4, 64))
    with torch.no_grad():
        losses = {str(k): float(wide(ids, ids, k)) for k in (1, 4)}
    values = {"initial_losses": losses, "initial_slot_losses": {k: [loss] for k, loss in losses.items()}}
    check_initial(values, 1000, 2048 * wide.config.initializer_range**2)
    with pytest.raises(RuntimeError, match="targets are lost"):
        check_initial(values, 1000, 0.0)
