"""Patch embedding in plain PyTorch, without an intermediate tensor of K times the output's size.

out[p] = (1/K) sum_k weight[ids[p, k]],      dW[v] = (1/K) sum over occurrences of v of dout[p]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkernels.numerics import accumulation_dtype, check_ids, inverse_counts

BLOCK_BYTES = 2**22  # of sums in fp32, so that they stay in a CPU's cache


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
    patch_size = ids.shape[1]
    # embedding_bag rounds a sum before it divides, which is exact in bfloat16 if it divides by a power of two.
    exact = weight.dtype == torch.bfloat16 and padding_idx is None and patch_size & (patch_size - 1) == 0
    try:
        if patch_size == 1:
            out = F.embedding(ids[:, 0], weight)
        elif exact or weight.dtype == accumulation_dtype(weight.dtype):
            out = _embedding_bag_mean(ids.long(), weight, padding_idx)
        else:
            out = _mean_in_fp32(ids, weight, padding_idx)
    except (IndexError, RuntimeError):  # both functions of torch check the ids, but do not say which is wrong
        check_ids(ids, vocab)
        raise
    return out if bad is None else out.masked_fill_(bad, torch.nan)


def _embedding_bag_mean(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:  # (N, D)
    """``F.embedding_bag(ids, weight, mode="mean")`` without its checks, which take as long as a small lookup."""
    first = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)  # of each patch
    mean, include_last = 1, False
    return torch.embedding_bag(weight, ids.reshape(-1), first, False, mean, False, None, include_last, padding_idx)[0]


def _mean_in_fp32(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:  # (N, D), 16 bits
    check_ids(ids, len(weight))
    total = torch.zeros(len(ids), weight.shape[1], dtype=torch.float32, device=weight.device)
    for slot in ids.T:
        rows = weight[slot]
        total += rows if padding_idx is None else rows.masked_fill_((slot == padding_idx).unsqueeze(1), 0)
    return total.mul_(inverse_counts(ids, padding_idx, torch.float32).unsqueeze(1)).to(weight.dtype)


def backward(
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    vocab: int,
    padding_idx: int | None,
) -> Tensor:  # (V, D)
    """The gradient of the table, in the dtype of ``grad``, summed in fp32 (fp64 for fp64) in a fixed order."""
    dtype = accumulation_dtype(grad.dtype)
    if grad.dtype != dtype and grad.device.type == "cpu":
        total = grad.new_zeros(vocab, grad.shape[1])
        for rows, sums in _sums_of_rows(grad, ids, vocab, padding_idx):
            total.index_copy_(0, rows, sums.to(total.dtype))
        return total
    total = torch.zeros(vocab, grad.shape[1], dtype=dtype, device=grad.device)
    _add_slots_(total, grad, ids, padding_idx)
    return total.to(grad.dtype)


def add_gradient_(
    total: Tensor,  # (V, D)
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    padding_idx: int | None,
) -> None:
    """Adds the gradient of the table to another one, in its memory."""
    if total.dtype == accumulation_dtype(total.dtype):
        _add_slots_(total, grad, ids, padding_idx)
    elif total.device.type == "cpu":
        for rows, sums in _sums_of_rows(grad, ids, len(total), padding_idx):
            total.index_copy_(0, rows, sums.add_(total.index_select(0, rows)).to(total.dtype))
    else:
        total += backward(grad.to(torch.float32), ids, len(total), padding_idx)


def _add_slots_(total: Tensor, grad: Tensor, ids: Tensor, padding_idx: int | None) -> None:
    """Slot by slot, in the dtype of ``total``."""
    kept = None if padding_idx is None else total[padding_idx].clone()
    if padding_idx is None:  # every patch has K tokens
        source, alpha = grad.to(total.dtype), 1 / ids.shape[1]
    else:
        source, alpha = _scaled(grad, ids, padding_idx, total.dtype), 1
    for slot in ids.clamp(0, len(total) - 1).T:
        total.index_add_(0, slot, source, alpha=alpha)
    if kept is not None:
        total[padding_idx] = kept


def _sums_of_rows(
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    vocab: int,
    padding_idx: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:  # rows (R), sums (R, D) in fp32
    """The gradient of the rows of the table that have one, some at a time, so that no fp32 copy of it is needed."""
    if not grad.numel():
        return
    flat, scaled = ids.reshape(-1), _scaled(grad, ids, padding_idx, torch.float32)
    ordered, order = (flat if padding_idx is None else flat.masked_fill(flat == padding_idx, vocab)).sort(stable=True)
    found, counts = torch.unique_consecutive(ordered, return_counts=True)
    found = found[: len(found) - int(found[-1] == vocab)].long()  # without padding
    patches, edges = order // ids.shape[1], F.pad(counts.cumsum(0), (1, 0))
    block, add = max(1, BLOCK_BYTES // (4 * grad.shape[1])), 0
    for start in range(0, len(found), block):
        rows = found[start : start + block]
        first = edges[start : start + len(rows) + 1]
        begin, end = int(first[0]), int(first[-1])
        first = first[:-1] - begin
        yield rows, torch.embedding_bag(scaled, patches[begin:end], first, False, add, False, None, False)[0]


def _scaled(grad: Tensor, ids: Tensor, padding_idx: int | None, dtype: torch.dtype) -> Tensor:  # (N, D)
    """The gradient of each of a patch's embeddings."""
    scaled = grad.to(dtype)
    return scaled if ids.shape[1] == 1 else scaled * inverse_counts(ids, padding_idx, dtype).unsqueeze(1)
