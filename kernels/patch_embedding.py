"""Triton kernels of patch embedding.

    out[p] = (1/K) sum_k weight[ids[p, k]],      dW[v] = (1/K) sum over occurrences of v of dout[p]

Forward: one program for each patch and block of columns reads K rows of the table, sums them in fp32 and rounds once.

Backward: a stable sort of the token ids gives each id a segment of the sorted order. A frequent id may make up 5 % of
a batch, so its segment is summed in two steps. First every aligned block of BLOCK_T tokens that lies inside one segment
is summed. Then a program adds, for each of some ids, the tokens before its first whole block, the sums of its blocks,
and the tokens after its last. Everything is summed in fp32 in a fixed order, so the result is deterministic, without
atomics, and nothing waits for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkernels.numerics import inverse_counts

BLOCK_T = 64  # tokens of a block in the backward
TILE_T = 8  # gradient rows that a program loads at a time
IDS = 8  # of the table, absent ones included, whose gradients a program writes
MAX_BLOCK_D = 512
NUM_WARPS = 2
UNSHARED_BLOCK_D = 512  # columns of a block from which on every thread of NUM_WARPS has columns of its own


def launch_config(hidden: int) -> dict[str, int]:
    """``BLOCK_D`` and ``num_warps`` for rows of ``hidden`` columns."""
    block = min(MAX_BLOCK_D, max(16, triton.next_power_of_2(hidden)))
    return {"BLOCK_D": block, "num_warps": max(1, NUM_WARPS * block // MAX_BLOCK_D)}


def forward(
    ids: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    padding_idx: int | None,
) -> Tensor:  # (N, D)
    """The mean of each patch's embeddings, summed in fp32 and rounded once; NaN where an id is outside the table."""
    (patches, slots), (vocab, hidden) = ids.shape, weight.shape
    out = weight.new_empty(patches, hidden)
    if out.numel() == 0:
        return out
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    config = launch_config(hidden)
    with torch.cuda.device_of(weight):  # Triton launches on the current device
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
            enable_fp_fusion=True,
        )
    return out


def backward(
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    vocab: int,
    padding_idx: int | None,
) -> Tensor:  # (V, D)
    """The gradient of the table, in the dtype of ``grad``, summed in fp32 in a fixed order."""
    out = grad.new_empty(vocab, grad.shape[1])
    if ids.numel() == 0 or out.numel() == 0:
        return out.zero_()
    _sum_gradients(grad, ids, out, padding_idx, add=False)
    return out


def add_gradient_(
    total: Tensor,  # (V, D), contiguous
    grad: Tensor,  # (N, D)
    ids: Tensor,  # (N, K)
    padding_idx: int | None,
) -> None:
    """Adds the gradient of the table, summed in fp32, to another one. Only the rows of the ids are read and written."""
    if ids.numel() and total.numel():
        _sum_gradients(grad, ids, total, padding_idx, add=True)


def _sum_gradients(grad: Tensor, ids: Tensor, out: Tensor, padding_idx: int | None, *, add: bool) -> None:
    slots, (vocab, hidden) = ids.shape[1], out.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    tokens = ids.numel()
    # ids outside [0, V) are sorted to the two ends, where they are part of no segment
    ordered, order = ids.reshape(-1).clamp(-1, vocab).to(torch.int32).sort(stable=True)
    segments = torch.searchsorted(ordered, torch.arange(vocab + 1, dtype=torch.int32, device=ids.device))
    blocks = tokens // BLOCK_T
    block_sums = torch.empty(max(blocks, 1), hidden, dtype=torch.float32, device=grad.device)
    # Without padding every patch has K tokens; Triton needs a tensor for an unused pointer too.
    scale = block_sums if padding_idx is None else inverse_counts(ids, padding_idx, torch.float32)
    config = launch_config(hidden)
    columns = triton.cdiv(hidden, config["BLOCK_D"])
    # Where a row has fewer columns than its threads hold, several threads add up the same column and all store it.
    # Their sums are the same bits without fused multiply-adds: fma(a, x, b * y) rounds b * y alone, and which of the
    # two products that is differs from thread to thread. Wider rows keep the fused ones, which take fewer registers.
    fused = config["BLOCK_D"] >= UNSHARED_BLOCK_D
    padding = {"PADDING": padding_idx is not None}
    shared = {"SLOTS": slots, "BLOCK_T": BLOCK_T, "TILE_T": TILE_T, **padding, **config, "enable_fp_fusion": fused}
    with torch.cuda.device_of(grad):  # Triton launches on the current device
        if blocks:
            patch_embedding_block_sums_kernel[(blocks, columns)](
                grad, ordered, order, scale, block_sums, grad.stride(0), hidden, **shared
            )
        patch_embedding_backward_kernel[(triton.cdiv(vocab, IDS), columns)](
            grad,
            order,
            segments,
            scale,
            block_sums,
            out,
            grad.stride(0),
            vocab,
            hidden,
            -1 if padding_idx is None else padding_idx,
            IDS=IDS,
            ADD=add,
            **shared,
        )


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
        for i in tl.static_range(UNROLL):  # independent loads, so that UNROLL of them are in flight at a time
            slot = first + i
            token = tl.load(ids_ptr + patch * SLOTS + slot, mask=slot < SLOTS, other=0).to(tl.int64)
            inside = (token >= 0) & (token < V)
            bad = bad | ~inside
            keep = inside & (slot < SLOTS)
            if PADDING:
                keep = keep & (token != padding_idx)
            count += keep.to(tl.int32)
            row = tl.load(weight_ptr + token * weight_stride + columns, mask=keep & (columns < D), other=0.0)
            # at K = 1 take the row itself: adding it to 0.0 would turn -0.0 into 0.0
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
    PADDING: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums, in sorted order, the scaled gradients of the patches to which the tokens at [begin, end) belong."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, TILE_T):
        positions = start + tl.arange(0, TILE_T)
        patches = tl.load(order_ptr + positions, mask=positions < end, other=0) // SLOTS
        scale = tl.full((TILE_T,), 1.0 / SLOTS, tl.float32)
        if PADDING:
            scale = tl.load(scale_ptr + patches, mask=positions < end, other=0.0)
        mask = (positions < end)[:, None] & (columns < D)[None, :]
        rows = tl.load(grad_ptr + patches[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(tl.float32) * scale[:, None], 0)
    return total


@triton.jit
def patch_embedding_block_sums_kernel(
    grad_ptr,  # (N, D)
    ordered_ptr,  # (N K), sorted ids
    order_ptr,  # (N K), the position of each sorted id before sorting
    scale_ptr,  # (N), fp32, read if PADDING; without padding it is 1 / K
    block_sums_ptr,  # (N K / BLOCK_T, D), fp32
    grad_stride,
    D,
    SLOTS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_T
    if tl.load(ordered_ptr + begin) == tl.load(ordered_ptr + begin + BLOCK_T - 1):  # the whole block has one id
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
            PADDING,
            TILE_T,
            BLOCK_D,
        )
        tl.store(block_sums_ptr + block * D + columns, total, mask=columns < D)


@triton.jit
def patch_embedding_backward_kernel(
    grad_ptr,  # (N, D)
    order_ptr,  # (N K)
    segments_ptr,  # (V + 1), where each id's segment begins in the sorted order
    scale_ptr,  # (N), fp32, read if PADDING; without padding it is 1 / K
    block_sums_ptr,  # (N K / BLOCK_T, D), fp32
    out_ptr,  # (V, D)
    grad_stride,
    V,
    D,
    padding_idx,
    IDS: tl.constexpr,
    ADD: tl.constexpr,  # to what is in the rows, instead of writing every row
    SLOTS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * IDS
    for token in range(first, tl.minimum(first + IDS, V)):
        begin = tl.load(segments_ptr + token)
        end = tl.load(segments_ptr + token + 1)
        if PADDING:
            end = tl.where(token == padding_idx, begin, end)
        first_block = (begin + BLOCK_T - 1) // BLOCK_T
        last_block = tl.maximum(end // BLOCK_T, first_block)
        # Tokens [begin, head), then whole blocks [first_block, last_block), then tokens [tail, end). A segment without
        # a whole block has head = end.
        head = tl.minimum(first_block * BLOCK_T, end)
        tail = tl.maximum(last_block * BLOCK_T, head)
        row = tl.full((), 0, tl.int64) + token  # V * D may exceed 2^31
        written = columns < D
        total = tl.zeros((BLOCK_D,), tl.float32)
        if ADD:
            written = written & (begin < end)
            total = tl.load(out_ptr + row * D + columns, mask=written, other=0.0).to(tl.float32)
            tl.debug_barrier()  # where several threads have the same column, all read it before one writes it
        total += _sum_tokens(
            grad_ptr, order_ptr, scale_ptr, grad_stride, begin, head, columns, D, SLOTS, PADDING, TILE_T, BLOCK_D
        )
        for start in range(first_block, last_block, TILE_T):
            blocks = start + tl.arange(0, TILE_T)
            mask = (blocks < last_block)[:, None] & (columns < D)[None, :]
            total += tl.sum(tl.load(block_sums_ptr + blocks[:, None] * D + columns[None, :], mask=mask, other=0.0), 0)
        total += _sum_tokens(
            grad_ptr, order_ptr, scale_ptr, grad_stride, tail, end, columns, D, SLOTS, PADDING, TILE_T, BLOCK_D
        )
        tl.store(out_ptr + row * D + columns, total.to(out_ptr.dtype.element_ty), mask=written)
