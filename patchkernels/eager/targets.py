"""The matrix ``c`` of weights, ignored targets and the reduction in plain PyTorch: ``loss = sum_nk c_nk l_nk``."""

from __future__ import annotations

import torch
from torch import Tensor


def coefficients(
    target: Tensor,  # (N, K)
    target_weight: Tensor | None,  # (K) or (N, K)
    ignore_index: int,
    reduction: str,
    every_loss: bool,  # targets of weight 0 are kept, since their losses are wanted
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # target (N, K), c (N, K) in dtype
    """``c``, and the targets, of which those of weight 0 are ignored."""
    valid = target != ignore_index
    weight = valid.to(dtype)
    if target_weight is not None:
        weight = torch.where(valid, target_weight.to(dtype), 0)
    if not every_loss:
        target = torch.where(weight != 0, target, ignore_index)
    if reduction == "mean":
        weight = _divide(weight, weight.sum())
    elif reduction == "slot_mean":
        count = valid.sum(0)
        slot_weight = torch.ones_like(count, dtype=dtype) if target_weight is None else target_weight.to(dtype)
        used = torch.where(count > 0, slot_weight, 0)
        weight = _divide(torch.where(valid, _divide(used, used.sum()), 0), count)
    return target, weight


def weighted_sum(
    losses: Tensor,  # (N, K)
    c: Tensor,  # (N, K)
) -> Tensor:  # ()
    """``sum c l`` over the targets whose ``c`` is not 0, also if the loss of others is NaN."""
    return torch.where(c != 0, losses * c, 0).sum()


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the numerator is 0. Weights that sum to 0 without being 0 give infinities, as in torch."""
    return torch.where(numerator != 0, numerator / denominator, 0)
