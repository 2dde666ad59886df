"""Triton kernels of patch embedding.

Forward: one program a patch and block of columns; K rows of the table, summed in fp32, cast once.

Backward: token ids are sorted (stable), so that each id owns a segment of the sorted order. Whole aligned blocks
of BLOCK_T tokens that lie inside one segment are summed first (an id may be 5 % of a batch); then one program an id
sums its segment: the loose tokens before the first whole block, the blocks' sums, the loose tokens after the last.
Everything is fp32 in a fixed order: deterministic, no atomics, no synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkernels.patch_embedding import inverse_counts

BLOCK_T = 64  # tokens summed at a time in the backward
TILE_T = 8  # rows in flight while summing
MAX_BLOCK_D = 512
NUM_WARPS = 2


def launch_config(hidden: int) -> dict[str, int]:
    """``BLOCK_D`` and ``num_warps`` for rows of ``hidden`` columns."""
    block = min(MAX_BLOCK_D, max(16, triton.next_power_of_2(hidden)))
    return {"BLOCK_D": block, "num_warps": max(1, NUM_WARPS * block // MAX_BLOCK_D)}


def forward(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """``(N, K)`` ids and ``(V, D)`` weight to ``(N, D)``."""
    (patches, slots), (vocab, hidden) = ids.shape, weight.shape
    out = weight.new_empty(patches, hidden)
    if out.numel() == 0:
        return out
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    config = launch_config(hidden)
    patch_embedding_kernel[(patches, triton.cdiv(hidden, config["BLOCK_D"]))](
        ids.contiguous(),
        weight,
        out,
        weight.stride(0),
        vocab,
        hidden,
        -1 if padding_idx is None or slots == 1 else padding_idx,
        SLOTS=slots,
        UNROLL=min(8, triton.next_power_of_2(slots)),
        PADDING=padding_idx is not None and slots > 1,
        **config,
    )
    return out


def backward(grad: Tensor, ids: Tensor, vocab: int, padding_idx: int | None) -> Tensor:
    """``(N, D)`` gradient of the patches to ``(V, D)`` gradient of the table, in the dtype of ``grad``."""
    slots, hidden = ids.shape[1], grad.shape[1]
    out = grad.new_empty(vocab, hidden)
    if ids.numel() == 0 or out.numel() == 0:
        return out.zero_()
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    tokens = ids.numel()
    # ids outside [0, V) are sorted to the two ends, where no segment reaches them
    ordered, order = ids.reshape(-1).clamp(-1, vocab).to(torch.int32).sort(stable=True)
    segments = torch.searchsorted(ordered, torch.arange(vocab + 1, dtype=torch.int32, device=ids.device))
    scale = inverse_counts(ids, padding_idx, torch.float32)
    blocks = tokens // BLOCK_T
    block_sums = torch.empty(max(blocks, 1), hidden, dtype=torch.float32, device=grad.device)
    config = launch_config(hidden)
    columns = triton.cdiv(hidden, config["BLOCK_D"])
    shared = {"SLOTS": slots, "BLOCK_T": BLOCK_T, "TILE_T": TILE_T, **config}
    if blocks:
        patch_embedding_block_sums_kernel[(blocks, columns)](
            grad, ordered, order, scale, block_sums, grad.stride(0), hidden, **shared
        )
    patch_embedding_backward_kernel[(vocab, columns)](
        grad,
        order,
        segments,
        scale,
        block_sums,
        out,
        grad.stride(0),
        hidden,
        -1 if padding_idx is None else padding_idx,
        **shared,
    )
    return out


@triton.jit
def patch_embedding_kernel(
    ids_ptr,  # (N, K)
    weight_ptr,  # (V, D)
    out_ptr,  # (N, D)
    weight_stride,
    V,
    D,
    padding_idx,
    SLOTS: tl.constexpr,
    UNROLL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    patch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = 0
    bad = False
    for first in range(0, SLOTS, UNROLL):
        for i in tl.static_range(UNROLL):  # UNROLL independent loads in flight
            slot = first + i
            token = tl.load(ids_ptr + patch * SLOTS + slot, mask=slot < SLOTS, other=0).to(tl.int64)
            inside = (token >= 0) & (token < V)
            bad = bad | ~inside
            keep = inside & (slot < SLOTS)
            if PADDING:
                keep = keep & (token != padding_idx)
            count += keep.to(tl.int32)
            row = tl.load(weight_ptr + token * weight_stride + columns, mask=keep & (columns < D), other=0.0)
            # at K = 1 a copy, so that -0.0 stays what it is
            total = row.to(tl.float32) if SLOTS == 1 else total + row.to(tl.float32)
    if PADDING:
        total = total / tl.maximum(count, 1)
    else:
        total = total * (1.0 / SLOTS)
    total = tl.where(bad, float("nan"), total)
    tl.store(out_ptr + patch * D + columns, total.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def _sum_tokens(
    grad_ptr,
    order_ptr,
    scale_ptr,
    grad_stride,
    begin,
    end,
    columns,
    D,
    SLOTS: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over sorted positions [begin, end) of their patches' scaled gradient, in order."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, TILE_T):
        positions = start + tl.arange(0, TILE_T)
        patches = tl.load(order_ptr + positions, mask=positions < end, other=0) // SLOTS
        scale = tl.load(scale_ptr + patches, mask=positions < end, other=0.0)
        mask = (positions < end)[:, None] & (columns < D)[None, :]
        rows = tl.load(grad_ptr + patches[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(tl.float32) * scale[:, None], 0)
    return total


@triton.jit
def patch_embedding_block_sums_kernel(
    grad_ptr,  # (N, D)
    ordered_ptr,  # (N K), sorted ids
    order_ptr,  # (N K), where they stood
    scale_ptr,  # (N), fp32
    block_sums_ptr,  # (N K / BLOCK_T, D), fp32
    grad_stride,
    D,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_T
    if tl.load(ordered_ptr + begin) == tl.load(ordered_ptr + begin + BLOCK_T - 1):  # one id throughout
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _sum_tokens(
            grad_ptr,
            order_ptr,
            scale_ptr,
            grad_stride,
            begin,
            begin + BLOCK_T,
            columns,
            D,
            SLOTS,
            TILE_T,
            BLOCK_D,
        )
        tl.store(block_sums_ptr + block * D + columns, total, mask=columns < D)


@triton.jit
def patch_embedding_backward_kernel(
    grad_ptr,  # (N, D)
    order_ptr,  # (N K)
    segments_ptr,  # (V + 1), where each id's segment begins in the sorted order
    scale_ptr,  # (N), fp32
    block_sums_ptr,  # (N K / BLOCK_T, D), fp32
    out_ptr,  # (V, D)
    grad_stride,
    D,
    padding_idx,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(segments_ptr + token)
    end = tl.load(segments_ptr + token + 1)
    end = tl.where(token == padding_idx, begin, end)
    first_block = (begin + BLOCK_T - 1) // BLOCK_T
    last_block = tl.maximum(end // BLOCK_T, first_block)
    # [begin, head) loose, [first_block, last_block) whole blocks, [tail, end) loose; without a whole block head = end
    head = tl.minimum(first_block * BLOCK_T, end)
    tail = tl.maximum(last_block * BLOCK_T, head)
    total = _sum_tokens(grad_ptr, order_ptr, scale_ptr, grad_stride, begin, head, columns, D, SLOTS, TILE_T, BLOCK_D)
    for start in range(first_block, last_block, TILE_T):
        blocks = start + tl.arange(0, TILE_T)
        mask = (blocks < last_block)[:, None] & (columns < D)[None, :]
        total += tl.sum(tl.load(block_sums_ptr + blocks[:, None] * D + columns[None, :], mask=mask, other=0.0), 0)
    total += _sum_tokens(grad_ptr, order_ptr, scale_ptr, grad_stride, tail, end, columns, D, SLOTS, TILE_T, BLOCK_D)
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=columns < D)
