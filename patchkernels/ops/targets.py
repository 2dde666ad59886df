"""Targets of the K-token losses: what each row predicts, with which weight, and how the losses are reduced.

Ignored labels, weights, repeated targets and every reduction are expressed by one matrix ``c`` of shape (N, K), with
``loss = sum_nk c_nk l_nk``. No tensor here has the size of the vocabulary, and nothing waits for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from patchkernels.eager.targets import coefficients, weighted_sum
from patchkernels.numerics import (
    IGNORE_INDEX,
    LossOptions,
    accumulation_dtype,
    check_class_dtype,
    check_float_dtype,
    check_loss_options,
    check_patch_size,
)

REDUCTIONS = ("mean", "slot_mean", "sum", "none")


def next_patch_targets(
    labels: Tensor,  # (..., T)
    patch_size: int,
    ignore_index: int = IGNORE_INDEX,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # (..., T / K, K)
    """``target[b, p, k] = labels[b, (p + 1) K + k]``; the last row is all ``ignore_index``.

    Row p holds the tokens of patch p + 1 (PatchTrain, arXiv 2407.12665, section 2). There are as many rows as hidden
    states, so that callers need not slice or shift either. At K = 1 these are the labels of ordinary next-token
    training, in the shape ``(..., T, 1)``.

    Args:
        labels: unshifted labels, shape ``(..., T)`` with T divisible by ``patch_size``; int32 or int64. Tokens that
            are stored as uint8 or uint16 must be converted first, since -100 is no number of these types.
        patch_size: K, at least 1.
        ignore_index: the label of a position without a target.
        process_group: the processes over which a sequence is split (context parallel), in the order of ranks and at
            patch boundaries. ``labels`` is then this process's part, of any length, and the last row of its targets is
            the first patch of the next process. To get the mean over the whole sequence, take ``reduction="sum"`` and
            divide by the number of valid targets of all processes.

    Returns:
        shape ``(..., T / K, K)``, the dtype of ``labels``.

    Raises:
        ValueError: K < 1, T not divisible by K, an ``ignore_index`` beyond the dtype of ``labels``, or a process
            without a patch.
        TypeError: labels that are not int32 or int64.
    """
    check_patch_size(patch_size)
    if labels.ndim == 0 or labels.shape[-1] % patch_size:
        raise ValueError(
            f"labels must have shape (..., T) with T divisible by patch_size, got {tuple(labels.shape)} "
            f"and patch_size={patch_size}"
        )
    check_class_dtype("labels", labels, ignore_index)
    patches = labels.unflatten(-1, (labels.shape[-1] // patch_size, patch_size))
    last = torch.full_like(patches[..., :1, :], ignore_index)
    if process_group is not None:
        if not labels.shape[-1]:
            raise ValueError(f"every process needs a patch of the sequence, got labels {tuple(labels.shape)}")
        first_patches = [torch.empty_like(last) for _ in range(process_group.size())]
        dist.all_gather(first_patches, patches[..., :1, :].contiguous(), process_group)
        last = [*first_patches, last][process_group.rank() + 1]
    return torch.cat([patches[..., 1:, :], last], dim=-2)


def mask_document_starts(
    target: Tensor,  # (B, P, K)
    begins: Tensor,  # (B, P) or (1, P), True where a patch begins a document
) -> Tensor:  # (B, P, K)
    """Ignores the targets of row p if patch p + 1 begins a document, since row p belongs to another document."""
    next_begins = F.pad(begins[:, 1:], (0, 1))
    return target.masked_fill(next_begins.unsqueeze(-1), IGNORE_INDEX)


def check_loss_arguments(input: Tensor, target: Tensor, vocab: int, options: LossOptions, kind: str) -> None:
    """Raises ValueError or TypeError for bad arguments of a loss; ``kind`` describes the input in the message."""
    check_float_dtype("input", input)
    if input.ndim == 0 or vocab == 0:
        raise ValueError(f"input must be {kind} with at least one class, got shape {tuple(input.shape)}")
    check_class_dtype("target", target, options.ignore_index)
    if target.shape[: input.ndim - 1] != input.shape[:-1] or target.ndim not in (input.ndim - 1, input.ndim):
        raise ValueError(
            f"target must have shape (..., K) or (...) for an input of {kind}: got target {tuple(target.shape)} "
            f"for input {tuple(input.shape)}"
        )
    if target.ndim == input.ndim and target.shape[-1] == 0:
        raise ValueError(f"target must hold at least one label per row, got shape {tuple(target.shape)}")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} but input is on {input.device}")
    check_loss_options(options)


def check_target_weight(input: Tensor, target: Tensor, target_weight: Any, reduction: str) -> None:
    """Raises ValueError or TypeError for an unknown reduction, and for weights that do not fit."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if target_weight is None:
        return
    slots = _slots(input, target)
    if not isinstance(target_weight, Tensor):
        raise TypeError(f"target_weight must be a tensor, got {target_weight!r}")
    if target_weight.is_complex():
        raise TypeError(f"target_weight must be real, got {target_weight.dtype}")
    if target_weight.requires_grad:
        raise ValueError("target_weight is a constant of the loss; got a tensor that requires grad")
    if target_weight.device != target.device:
        raise ValueError(f"target_weight is on {target_weight.device} but target is on {target.device}")
    if target_weight.shape not in ((slots,), target.shape):
        raise ValueError(
            f"target_weight must have shape ({slots},) or {tuple(target.shape)}, got {tuple(target_weight.shape)}"
        )
    if reduction == "slot_mean" and target_weight.shape != (slots,):
        raise ValueError(
            f"reduction='slot_mean' takes a target_weight of shape ({slots},), one weight per slot, "
            f"got {tuple(target_weight.shape)}"
        )


def _slots(input: Tensor, target: Tensor) -> int:
    return target.shape[-1] if target.ndim == input.ndim else 1


def as_rows(
    input: Tensor,  # (..., D) or (..., V)
    target: Tensor,  # (..., K), or (...) for K = 1
    target_weight: Tensor | None,  # (K) or the shape of target
) -> tuple[Tensor, Tensor | None]:  # (N, K); (K) or (N, K)
    """Targets and their weights without leading dimensions."""
    slots = _slots(input, target)
    if target_weight is not None and target_weight.shape != (slots,):
        target_weight = target_weight.reshape(-1, slots)
    return target.reshape(-1, slots), target_weight


def weigh_rows(
    target: Tensor,  # (N, K)
    target_weight: Tensor | None,  # (K) or (N, K)
    ignore_index: int,
    reduction: str,
    return_losses: bool,
    dtype: torch.dtype,  # of the logits
) -> tuple[Tensor, Tensor]:  # target (N, K), c (N, K)
    """The targets and the matrix ``c``: ``loss = sum c l``, or ``c * l`` for ``reduction="none"``.

    Targets of weight 0 are ignored, so that no logits are read for them alone, unless their losses are returned.
    """
    return coefficients(target, target_weight, ignore_index, reduction, return_losses, accumulation_dtype(dtype))


def reduce_losses(
    losses: Tensor,  # (N, K)
    c: Tensor,  # (N, K)
    shape: torch.Size,
    reduction: str,
) -> Tensor:
    """``sum c l``, or for ``reduction="none"`` ``c * l`` in the shape of the targets."""
    if reduction == "none":
        return torch.where(c != 0, losses * c, 0).reshape(shape)
    return weighted_sum(losses, c)
