"""Shared by the operators and both backends: options of the loss, dtypes of sums, range checks, the loss of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a position that has no target, as in torch.nn.functional.cross_entropy


class LossOptions(NamedTuple):
    """The options on which the loss of a row depends, besides its logits and its targets."""

    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss_weight: float = 0.0


# The fields of LossOptions as they stand in an operator's schema. A schema has no tuples, so each field is an argument.
# They come last, and the operator's function receives them as `*loss_options`.
LOSS_OPTIONS = "SymInt ignore_index, float label_smoothing, float? softcap, float z_loss_weight"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_counts(
    ids: Tensor,  # (N, K)
    padding_idx: int | None,
    dtype: torch.dtype,
) -> Tensor:  # (N)
    """``1 / (tokens of a patch that are not padding)``; 1 for a patch that holds nothing but padding."""
    patches, patch_size = ids.shape
    if padding_idx is None or patch_size == 1:
        return torch.full((patches,), 1 / patch_size, dtype=dtype, device=ids.device)
    return (ids != padding_idx).sum(-1).clamp(min=1).to(dtype).reciprocal()


def check_patch_size(patch_size: int) -> None:
    """Raises ValueError for a patch size below 1."""
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")


def check_ids(ids: Tensor, vocab: int) -> None:
    """Raises IndexError for a token id outside [0, V).

    Ids on a GPU are not checked, because reading them would make the program wait for the GPU.
    """
    if ids.device.type == "cpu" and ids.numel():
        for extreme in ids.aminmax():
            if not 0 <= extreme < vocab:
                raise IndexError(f"token ids must be in [0, {vocab}), got {extreme.item()}")


def check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises IndexError for a target outside [0, V) that is not ``ignore_index``.

    Targets on a GPU are not checked, because reading them would make the program wait for the GPU.
    """
    if target.device.type == "cpu":
        bad = target[(target != ignore_index) & ((target < 0) | (target >= vocab))]
        if len(bad):
            raise IndexError(f"targets must be in [0, {vocab}) or ignore_index={ignore_index}, got {bad[0].item()}")


def row_losses(
    lse: Tensor,  # (N), log-sum-exp of each row's logits
    picked: Tensor,  # (N, K), the logits of the targets
    mean: Tensor,  # (N), mean of each row's logits; used only with label smoothing
    target: Tensor,  # (N, K)
    vocab: int,
    options: LossOptions,
) -> Tensor:  # (N, K)
    """``l = lse - (1 - e) z_t - e mean_v z_v + z_loss_weight lse^2``, with ``e = label_smoothing``.

    An ignored target has the loss 0, and a target outside [0, V) the loss NaN.
    """
    lse = lse.unsqueeze(1)
    losses = lse - (1 - options.label_smoothing) * picked
    if options.label_smoothing:
        losses = losses - options.label_smoothing * mean.unsqueeze(1)
    if options.z_loss_weight:
        losses = losses + options.z_loss_weight * lse**2
    losses = losses.masked_fill((target < 0) | (target >= vocab), torch.nan)
    return losses.masked_fill(target == options.ignore_index, 0)
