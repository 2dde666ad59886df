"""The results as plain PyTorch computes them in the dtype of the case: how exact one can be without effort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embedding(ids: Tensor, weight: Tensor, patch_size: int, padding_idx: int | None) -> Tensor:
    shape = (*ids.shape[:-1], ids.shape[-1] // patch_size, weight.shape[1])
    padding = None if padding_idx is None else padding_idx % len(weight)
    if patch_size == 1:
        return F.embedding(ids, weight, padding).reshape(shape)
    patches = ids.reshape(-1, patch_size)
    mean = F.embedding_bag(patches, weight.to(sum_dtype(weight)), mode="mean", padding_idx=padding)
    return mean.to(weight.dtype).reshape(shape)


def losses(
    z: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
) -> Tensor:  # (N, K), fp32 (fp64 for fp64)
    z = z.to(sum_dtype(z))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    smoothing = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": "none"}
    columns = [F.cross_entropy(z, slot, **smoothing) for slot in target.long().T]
    z_loss = z_loss_weight * z.logsumexp(1, keepdim=True) ** 2
    return torch.stack(columns, 1) + torch.where(target != ignore_index, z_loss if z_loss_weight else 0, 0)


def reduce(l: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:  # noqa: E741
    valid = target != ignore_index
    w = torch.ones_like(l) if weight is None else weight.to(l.dtype).expand(l.shape)
    if reduction == "slot_mean":
        count = valid.sum(0)
        w = torch.where(valid & (w != 0), w / count.clamp(min=1), 0)
        reduction = "mean"
    w = torch.where(valid, w, 0)
    weighted = torch.where(w != 0, w * l, 0)
    if reduction == "none":
        return weighted
    return weighted.sum() if reduction == "sum" or not bool((w != 0).any()) else weighted.sum() / w.sum()


def sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
