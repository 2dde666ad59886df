"""Losses on the held-out text, and a check of the losses before training.

The token-level loss is measured in every phase on the same rows, so that runs with different phases are comparable.
In a patch phase the loss of each of the K slots is measured too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from patchkernels.training.run import Rows, Run

INITIAL_SPREAD = 0.05  # largest relative deviation of a loss before training from its expected value


def is_time_to_evaluate(run: Run) -> bool:
    """True every ``eval_every`` steps, at the end of a phase, and 1, 2, 4, 8, ... steps after each change of phase."""
    index, steps_before = run.schedule.locate(run.step - 1)
    steps_in_phase = steps_before + 1
    is_power_of_two = steps_in_phase.bit_count() == 1
    return run.phase_ended or run.step % run.config.log.eval_every == 0 or (index > 0 and is_power_of_two)


def evaluate(run: Run, patch_size: int) -> dict[str, Any]:
    """Token-level loss and bits per byte; for K > 1 also the loss of each slot, if a row holds two patches."""
    (token_loss,) = slot_losses(run, 1)
    bits = token_loss / math.log(2) / run.corpus.bytes_per_token
    values: dict[str, Any] = {"validation_loss": token_loss, "validation_bits_per_byte": bits}
    if patch_size > 1 and has_targets(run, patch_size):
        values["validation_slot_losses"] = slot_losses(run, patch_size)
    return values


def initial_losses(run: Run) -> dict[str, Any]:
    """The loss of held-out rows at every patch size of the run: reduced as in training, and for each slot."""
    sizes = sorted({phase.patch_size for phase in run.schedule.phases})
    measurable = [size for size in sizes if has_targets(run, size)]
    with torch.no_grad():
        losses = {
            str(size): float(run.loss(*next(held_out_parts(run, size)), size, compiled=False)) for size in measurable
        }
    return {"initial_losses": losses, "initial_slot_losses": {str(size): slot_losses(run, size) for size in measurable}}


@torch.no_grad()
def slot_losses(run: Run, patch_size: int) -> list[float]:
    """The mean loss of each of the K slots over the held-out rows, each row cut to whole patches."""
    total, count = (torch.zeros(patch_size, dtype=torch.float64) for _ in range(2))
    for rows in held_out_parts(run, patch_size):
        losses = run.loss(*rows, patch_size, "none", compiled=False).double().cpu()  # (B, P, K)
        total += losses.sum((0, 1))
        count += (losses != 0).sum((0, 1))  # the loss of an ignored target is exactly 0
    return (total / count.clamp(min=1)).tolist()


def has_targets(run: Run, patch_size: int) -> bool:
    """Whether a held-out row holds two patches, so that the first can predict the second."""
    return run.config.schedule.context >= 2 * patch_size


def held_out_parts(run: Run, patch_size: int) -> Iterator[Rows]:
    """The held-out rows, ``batch_size`` of them at a time."""
    length = run.config.schedule.context // patch_size * patch_size
    batch_size = run.config.schedule.batch_size
    ids, labels, documents = run.held_out
    for first in range(0, len(ids), batch_size):
        part = (slice(first, first + batch_size), slice(length))
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
