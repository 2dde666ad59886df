"""Runs of 50 steps have the losses of ``tests/golden``: a change of the arithmetic is seen, and not by chance."""

from __future__ import annotations

import json

import pytest
import torch
from golden_runs import GOLDEN, RUNS, curve, golden_text


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return golden_text(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name, words, tmp_path):
    """Another CPU, or another number of threads, adds up in another order, which 50 steps make larger."""
    found, golden = curve(name, words, tmp_path / "run"), json.loads((GOLDEN / f"{name}.json").read_text())
    assert len(golden["loss"]) == 50
    tolerance = 2e-2 if name == "bf16" else 1e-3
    for losses in golden:
        torch.testing.assert_close(torch.tensor(found[losses]), torch.tensor(golden[losses]), rtol=tolerance, atol=0)


def test_runs_that_compute_the_same_have_the_same_golden_losses():
    golden = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in RUNS}
    for name in ("compiled", "checkpointed", "two-processes"):
        for losses in ("loss", "validation_loss"):
            ours, plain = (torch.tensor(golden[run][losses]) for run in (name, "fp32"))
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=0)
