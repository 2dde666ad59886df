"""Shared by the operators and both backends: options of the loss, dtypes of sums, range checks, the loss of a row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a position that has no target, as in torch.nn.functional.cross_entropy
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SOFTCAPS = (1e-30, 1e30)  # soft caps by which fp32 logits can be divided and multiplied without losing their digits


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


def check_float_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor of another dtype than float32, bfloat16, float16 and float64."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point, one of {FLOAT_DTYPES}, got {tensor.dtype}")


def check_class_dtype(name: str, tensor: Tensor, ignore_index: int = IGNORE_INDEX) -> None:
    """Raises TypeError for classes that are not int32 or int64 or an ``ignore_index`` that is no integer.

    An ``ignore_index`` beyond the dtype of the classes is a ValueError. Other integers are not taken, because
    ``ignore_index`` would become a class in some: -100 is 156 in uint8.
    """
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be class indices, int32 or int64, got {tensor.dtype}")
    if isinstance(ignore_index, float):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index}")
    limits = torch.iinfo(tensor.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"ignore_index must be a number of the dtype of {name}, {tensor.dtype}, got {ignore_index}")


def check_loss_options(options: LossOptions) -> None:
    """Raises ValueError for an option that is out of its range or not finite."""
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {options.label_smoothing}")
    smallest, largest = SOFTCAPS
    if options.softcap is not None and not smallest <= options.softcap <= largest:
        raise ValueError(
            f"softcap must be positive, got {options.softcap}; fp32 logits can be divided by {smallest} to {largest}"
        )
    if not (options.z_loss_weight >= 0 and math.isfinite(options.z_loss_weight)):
        raise ValueError(f"z_loss_weight must not be negative and must be finite, got {options.z_loss_weight}")


def check_patch_size(patch_size: int) -> None:
    """Raises ValueError for a patch size below 1, and TypeError for what is no integer."""
    if isinstance(patch_size, float | bool):
        raise TypeError(f"patch_size must be an integer, got {patch_size}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")


def check_ids(ids: Tensor, vocab: int) -> None:
    """Raises IndexError for a token id outside [0, V).

    Ids on a GPU are not checked, because reading them would make the program wait for the GPU.
    """
    if ids.device.type == "cpu" and ids.numel():
        for extreme in _extremes(ids):
            if not 0 <= extreme < vocab:
                raise IndexError(f"token ids must be in [0, {vocab}), got {extreme}")


def check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises IndexError for a target outside [0, V) that is not ``ignore_index``.

    Targets on a GPU are not checked, because reading them would make the program wait for the GPU.
    """
    if target.device.type == "cpu":
        for extreme in _extremes(target.masked_fill(target == ignore_index, 0)) if target.numel() else ():
            if not 0 <= extreme < vocab:
                raise IndexError(f"targets must be in [0, {vocab}) or ignore_index={ignore_index}, got {extreme}")


def _extremes(numbers: Tensor) -> tuple[int, int]:
    """The smallest and the largest. Comparing tensors with numbers would take longer than finding them."""
    smallest, largest = numbers.aminmax()
    return int(smallest.item()), int(largest.item())


def new_statistics(
    target: Tensor,  # (N, K)
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (3, N) and (N, K)
    """The statistics of rows of which no logits have been seen, and memory for the logits of their targets.

    The statistics of a row are ``max z``, ``sum exp(z - max)`` and, used with label smoothing only, ``sum (z - max)``.
    Log-sum-exp is not kept as one number: rounded at logits of 1e4, it would have an absolute error of 5e-4, and so
    would the loss. Max and sum have relative errors, and the loss takes its differences from the max.
    """
    statistics = torch.zeros(3, len(target), dtype=dtype, device=target.device)
    statistics[0] = -torch.inf
    return statistics, torch.zeros(target.shape, dtype=dtype, device=target.device)


def row_losses(
    statistics: Tensor,  # (3, N): max z, sum exp(z - max), sum (z - max)
    picked: Tensor,  # (N, K), the logits of the targets
    target: Tensor,  # (N, K)
    vocab: int,
    options: LossOptions,
) -> Tensor:  # (N, K)
    """``l = (1 - e) (max - z_t) + e (max - mean_v z_v) + log sum exp(z - max) + z_loss_weight lse^2``.

    ``e`` is ``label_smoothing``. An ignored target has the loss 0, and a target outside [0, V) the loss NaN.
    """
    largest, total, below = statistics.unsqueeze(2).unbind()
    log_total = total.log()
    losses = (1 - options.label_smoothing) * (largest - picked) + log_total
    if options.label_smoothing:
        losses = losses - (options.label_smoothing / vocab) * below
    if options.z_loss_weight:
        losses = losses + options.z_loss_weight * (largest + log_total) ** 2
    losses = losses.masked_fill((target < 0) | (target >= vocab), torch.nan)
    return losses.masked_fill(target == options.ignore_index, 0)
