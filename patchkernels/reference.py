"""The definition of every operator in plain, differentiable PyTorch. Each computes in the dtype of its inputs.

Tests and benchmarks compare with these definitions (in fp64); nothing in the library calls them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkernels.numerics import IGNORE_INDEX


def patch_embedding(
    input_ids: Tensor,  # (..., T)
    weight: Tensor,  # (V, D)
    patch_size: int,
    *,
    padding_idx: int | None = None,
) -> Tensor:  # (..., T / K, D)
    """``out[p] = mean_k weight[ids[p K + k]]``, padding left out of the mean (PatchTrain, section 2)."""
    embedded: Tensor = F.embedding(input_ids, weight, padding_idx).unflatten(-2, (-1, patch_size))  # (..., P, K, D)
    mean: Tensor = embedded.mean(-2)
    if padding_idx is None or patch_size == 1:
        return mean
    kept = (input_ids != padding_idx % weight.shape[0]).unflatten(-1, (-1, patch_size)).unsqueeze(-1)
    mean = (embedded * kept).sum(-2) / kept.sum(-2).clamp(min=1)
    return mean


def next_patch_targets(labels: Tensor, patch_size: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """``target[b, p, k] = labels[b, (p + 1) K + k]``; the last row is all ``ignore_index``."""
    patches = labels.unflatten(-1, (-1, patch_size))
    return torch.cat([patches[..., 1:, :], torch.full_like(patches[..., :1, :], ignore_index)], dim=-2)


def patch_cross_entropy(
    input: Tensor,  # logits (..., V)
    target: Tensor,  # (..., K) or (...)
    *,
    target_weight: Tensor | None = None,  # (K) or (..., K)
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """``w[n,k] (lse_n - z[n, t_nk])``, reduced: K targets share one row of logits (PatchTrain, section 2)."""
    z = input if softcap is None else softcap * torch.tanh(input / softcap)
    t = target.unsqueeze(-1) if target.ndim == input.ndim - 1 else target
    valid = t != ignore_index
    w = valid.to(z.dtype) * (1 if target_weight is None else target_weight.to(z.dtype))
    lse = z.logsumexp(-1, keepdim=True)
    picked = z.gather(-1, t.where(valid, 0))
    loss = lse - picked
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - z.mean(-1, keepdim=True))
    loss = (w * (loss + z_loss_weight * lse**2)).where(w != 0, 0)
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / w.sum().where((w != 0).any(), 1)
    per_slot = torch.ones(t.shape[-1], dtype=z.dtype, device=z.device) if target_weight is None else target_weight
    count = valid.reshape(-1, t.shape[-1]).sum(0)  # (K)
    per_slot = per_slot.to(z.dtype).where(count > 0, 0)
    # The losses stay unweighted here: each slot's weight is applied below, to the mean of the slot.
    unweighted = patch_cross_entropy(
        input,
        t,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss_weight=z_loss_weight,
    )
    slot_mean = unweighted.reshape(-1, t.shape[-1]).sum(0) / count.clamp(min=1)
    return (per_slot * slot_mean).sum() / per_slot.sum().where((per_slot != 0).any(), 1)


def linear_patch_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: object,
) -> Tensor:
    """``patch_cross_entropy(input @ linear_weight.T + linear_bias, target, ...)``."""
    return patch_cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)  # type: ignore[arg-type]
