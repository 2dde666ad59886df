"""Losses on the held-out text, and a check of the losses before training.

The token-level loss is measured in every phase on the same rows, so that runs with different phases are comparable.
In a patch phase the loss of each of the K slots is measured too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from patchkernels.data.batches import Rows
from patchkernels.training.run import Run, count_targets

INITIAL_SPREAD = 0.05  # largest relative deviation of a loss before training from its expected value


def is_time_to_evaluate(run: Run) -> bool:
    """True every ``eval_every`` steps, at the end of a phase, and 1, 2, 4, 8, ... steps after each change of phase."""
    index, steps_before = run.schedule.locate(run.step - 1)
    steps_in_phase = steps_before + 1
    is_power_of_two = steps_in_phase.bit_count() == 1
    return run.phase_ended or run.step % run.config.log.eval_every == 0 or (index > 0 and is_power_of_two)


def evaluate(run: Run, patch_size: int) -> dict[str, Any]:
    """Token-level loss, and bits per byte if the bytes are known. For K > 1 also the loss of each slot, if a row holds
    two patches and the model gives the loss of every target. Nothing if the run has no held-out rows.

    Random numbers that the model draws here are not missing in training, however often this is called.
    """
    if run.held_out is None:
        return {}
    with modes_restored(run.model), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        run.model.eval()
        token_loss = slot_losses(run, 1)[0] if run.objective.takes_reduction else mean_loss(run, 1)
        values: dict[str, Any] = {"validation_loss": token_loss}
        if run.bytes_per_token is not None:
            values["validation_bits_per_byte"] = token_loss / math.log(2) / run.bytes_per_token
        if patch_size > 1 and has_targets(run, patch_size) and run.objective.takes_reduction:
            values["validation_slot_losses"] = slot_losses(run, patch_size)
    return values


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """After the block every module is in training or evaluation mode as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def initial_losses(run: Run) -> dict[str, Any]:
    """The loss of held-out rows at every patch size of the run: reduced as in training, and for each slot."""
    sizes = sorted({phase.patch_size for phase in run.schedule.phases})
    measurable = [size for size in sizes if has_targets(run, size)]
    losses = {str(size): mean_loss(run, size) for size in measurable}
    return {"initial_losses": losses, "initial_slot_losses": {str(size): slot_losses(run, size) for size in measurable}}


@torch.no_grad()
def mean_loss(run: Run, patch_size: int) -> float:
    """The loss of the held-out rows, reduced as in training: the mean over all their targets."""
    total, count = 0.0, 0
    for rows in held_out_parts(run, patch_size):
        if targets := int(count_targets(rows, patch_size).sum()):
            total += float(run.loss(*rows, patch_size, compiled=False)) * targets
            count += targets
    return total / max(count, 1)


@torch.no_grad()
def slot_losses(run: Run, patch_size: int) -> list[float]:
    """The mean loss of each of the K slots over the held-out rows, each row cut to whole patches."""
    total, count = (torch.zeros(patch_size, dtype=torch.float64) for _ in range(2))
    for rows in held_out_parts(run, patch_size):
        losses = run.loss(*rows, patch_size, "none", compiled=False).double().cpu()  # (B, P, K)
        total += losses.sum((0, 1))
        count += count_targets(rows, patch_size).cpu()
    return (total / count.clamp(min=1)).tolist()


def has_targets(run: Run, patch_size: int) -> bool:
    """Whether a held-out row holds two patches, so that the first can predict the second."""
    return run.schedule.context >= 2 * patch_size


def held_out_parts(run: Run, patch_size: int) -> Iterator[Rows]:
    """The held-out rows, as many at a time as this process computes at a time in training."""
    assert run.held_out is not None
    length = run.schedule.context // patch_size * patch_size
    at_once = run.schedule.batch_size // (run.processes.world_size * run.config.accumulation)
    ids, labels, documents = run.held_out
    for first in range(0, len(ids), at_once):
        part = (slice(first, first + at_once), slice(length))
        yield (
            ids[part].to(run.device),
            labels[part].to(run.device),
            None if documents is None else documents[part].to(run.device),
        )


def check_initial(values: dict[str, Any], vocab_size: int, variance: float) -> None:
    """Checks that every loss before the first step is about ``log V + variance / 2``, for any patch size and slot.

    ``variance`` is the variance of the new model's logits, ``D std^2`` after the last norm: 0.05 for the demo model,
    1.6 for D = 4096. A bug that loses K - 1 of the K targets shows only here: during training the loss falls all the
    same.

    Raises:
        RuntimeError: a loss deviates by more than 5 %.
    """
    expected = math.log(vocab_size) + variance / 2
    for size, slots in values["initial_slot_losses"].items():
        losses = [values["initial_losses"][size], *slots]
        if any(abs(loss - expected) > INITIAL_SPREAD * expected for loss in losses):
            raise RuntimeError(
                f"before the first step the loss at K = {size} and those of its slots are {losses}, and log V is "
                f"{math.log(vocab_size):.3f}: targets are lost"
            )
