"""Patch embedding in plain PyTorch, without an intermediate tensor of K times the output's size.

out[p] = (1/K) sum_k weight[ids[p, k]],      dW[v] = (1/K) sum over occurrences of v of dout[p]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkernels.numerics import accumulation_dtype, check_ids, inverse_counts


def forward(
    ids: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    padding_idx: int | None,
) -> Tensor:  # (N, D)
    """The mean of each patch's embeddings, summed in fp32 (fp64 for fp64) and rounded once."""
    vocab = weight.shape[0]
    bad = None
    if ids.device.type != "cpu":  # a bad id gives NaN here, since an error would wait for the device
        bad = ((ids < 0) | (ids >= vocab)).any(1, keepdim=True)
        ids = ids.clamp(0, max(vocab - 1, 0))
    check_ids(ids, vocab)
    patch_size = ids.shape[1]
    if patch_size == 1:
        out = F.embedding(ids[:, 0], weight)
    elif weight.dtype == accumulation_dtype(weight.dtype):
        out = F.embedding_bag(ids.long(), weight, mode="mean", padding_idx=padding_idx)
    else:  # embedding_bag would round the sum to 16 bits before it divides
        total = torch.zeros(len(ids), weight.shape[1], dtype=torch.float32, device=weight.device)
        for slot in ids.T:
            rows = weight[slot]
            total += rows if padding_idx is None else rows.masked_fill_((slot == padding_idx).unsqueeze(1), 0)
        out = total.mul_(inverse_counts(ids, padding_idx, torch.float32).unsqueeze(1)).to(weight.dtype)
    return out if bad is None else out.masked_fill_(bad, torch.nan)


def backward(
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    vocab: int,
    padding_idx: int | None,
) -> Tensor:  # (V, D)
    """The gradient of the table, in the dtype of ``grad``, summed slot by slot in fp32 (fp64 for fp64)."""
    total = torch.zeros(vocab, grad.shape[1], dtype=accumulation_dtype(grad.dtype), device=grad.device)
    _add_slots_(total, grad, ids, padding_idx)
    if padding_idx is not None:
        total[padding_idx] = 0
    return total.to(grad.dtype)


def add_gradient_(
    total: Tensor,  # (V, D)
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    padding_idx: int | None,
) -> None:
    """Adds the gradient of the table to another one, in its memory."""
    dtype = accumulation_dtype(grad.dtype)
    if padding_idx is None and total.dtype == dtype:
        _add_slots_(total, grad, ids, None)
    else:
        total += backward(grad.to(dtype), ids, len(total), padding_idx)


def _add_slots_(total: Tensor, grad: Tensor, ids: Tensor, padding_idx: int | None) -> None:
    scaled = grad.to(total.dtype)
    if ids.shape[1] > 1:
        scaled = scaled * inverse_counts(ids, padding_idx, total.dtype).unsqueeze(1)
    for slot in ids.T:
        total.index_add_(0, slot.clamp(0, len(total) - 1), scaled)
