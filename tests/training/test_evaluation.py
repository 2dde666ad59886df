"""Losses on the held-out text against expected values."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import changed

from patchkernels.data.batches import read_rows, validation_rows
from patchkernels.data.corpus import prepare
from patchkernels.training.log import read_log
from patchkernels.training.train import train


def test_the_loss_before_the_first_step_is_that_of_chance_in_every_phase_and_slot(config):
    start = read_log(train(config) / "log.jsonl")[0]
    chance = pytest.approx(math.log(300), rel=0.02)
    assert start["validation_loss"] == chance
    assert start["initial_losses"] == {"1": chance, "4": chance}
    assert {k: len(v) for k, v in start["initial_slot_losses"].items()} == {"1": 1, "4": 4}
    assert all(loss == chance for losses in start["initial_slot_losses"].values() for loss in losses)


def test_validation_is_token_level_in_a_patch_phase(config):
    """The losses are those of transformers' model and PyTorch's cross entropy on the held-out rows."""
    run = train(changed(config, phases="4:1"))
    (last,) = read_log(run / "log.jsonl")[-1:]
    corpus, context = prepare(config.data), config.schedule.context
    rows = validation_rows(corpus.validation, context, config.log.eval_rows)
    ids, _, _ = read_rows(corpus.validation, rows, context, packed=False)
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert last["validation_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert last["validation_bits_per_byte"] == pytest.approx(float(expected) / math.log(2) / corpus.bytes_per_token)
