"""Triton kernels for the matrix ``c``, ``loss = sum_nk c_nk l_nk``, and for that sum: one program each.

The tensors have N K elements and no vocabulary: a megabyte at most. One program reads them in microseconds, in a fixed
order, where PyTorch's operations would take some twenty launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # targets that a program holds at a time
NUM_WARPS = 16
REDUCTIONS = {"sum": 0, "none": 0, "mean": 1, "slot_mean": 2}


def launch_config(slots: int) -> dict[str, int]:
    """``BLOCK_N``, ``BLOCK_K`` and ``num_warps`` for rows of ``slots`` targets."""
    columns = triton.next_power_of_2(slots)
    return {"BLOCK_N": max(BLOCK // columns, 1), "BLOCK_K": columns, "num_warps": NUM_WARPS}


def coefficients(
    target: Tensor,  # (N, K)
    target_weight: Tensor | None,  # (K) or (N, K)
    ignore_index: int,
    reduction: str,
    every_loss: bool,  # targets of weight 0 are kept, since their losses are wanted
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # target (N, K), c (N, K) in fp32
    """``c``, and the targets, of which those of weight 0 are ignored."""
    target = target.contiguous()
    kept, c = torch.empty_like(target), torch.empty(target.shape, dtype=dtype, device=target.device)
    # Triton needs a tensor for an unused pointer too
    weight = c if target_weight is None else target_weight.to(torch.float32).contiguous()
    rows, slots = target.shape
    with torch.cuda.device_of(target):  # Triton launches on the current device
        target_coefficients_kernel[(1,)](
            target, weight, kept, c, rows, ignore_index, 0 if weight.ndim == 1 else slots, SLOTS=slots,
            WEIGHTED=target_weight is not None, REDUCTION=REDUCTIONS[reduction], EVERY_LOSS=every_loss,
            **launch_config(slots), enable_fp_fusion=True,
        )  # fmt: skip
    return kept, c


def weighted_sum(
    losses: Tensor,  # (N, K), fp32, contiguous
    c: Tensor,  # (N, K), fp32, contiguous
) -> Tensor:  # ()
    """``sum c l`` over the targets whose ``c`` is not 0."""
    total = torch.empty((), dtype=torch.float32, device=losses.device)
    with torch.cuda.device_of(losses):  # Triton launches on the current device
        weighted_sum_kernel[(1,)](
            losses, c, total, losses.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return total


@triton.jit
def _divide(numerator, denominator):
    """The quotient, correctly rounded; 0 where the numerator is 0."""
    return tl.where(numerator != 0.0, tl.math.div_rn(numerator, tl.where(numerator != 0.0, denominator, 1.0)), 0.0)


@triton.jit
def _weights(
    target_ptr, weight_ptr, rows, slots, N, ignore_index, weight_stride, SLOTS: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Of some rows: their places in the matrix, which of them exist, their targets, which are valid, their weights."""
    places = rows.to(tl.int64)[:, None] * SLOTS + slots[None, :]
    exists = (rows < N)[:, None] & (slots < SLOTS)[None, :]
    target = tl.load(target_ptr + places, mask=exists, other=ignore_index)
    valid = exists & (target != ignore_index)
    weight = valid.to(tl.float32)
    if WEIGHTED:
        given = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + slots[None, :]
        weight = tl.load(given, mask=valid, other=0.0).to(tl.float32)
    return places, exists, target, valid, weight


@triton.jit(do_not_specialize=["ignore_index"])
def target_coefficients_kernel(
    target_ptr,  # (N, K)
    weight_ptr,  # (K) or (N, K), read if WEIGHTED
    kept_ptr,  # (N, K)
    c_ptr,  # (N, K), fp32
    N,
    ignore_index,
    weight_stride,  # of a row: 0 for one weight a slot
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REDUCTION: tl.constexpr,  # 0: sum, 1: mean, 2: slot_mean
    EVERY_LOSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slots = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if REDUCTION != 0:
        for start in range(0, N, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            _, _, _, valid, weight = _weights(
                target_ptr, weight_ptr, rows, slots, N, ignore_index, weight_stride, SLOTS, WEIGHTED
            )
            total += weight if REDUCTION == 1 else valid.to(tl.float32)
    per_slot = tl.sum(total, 0)  # sums of weights, or counts of valid targets
    share = per_slot
    if REDUCTION == 2:
        slot_weight = (slots < SLOTS).to(tl.float32)
        if WEIGHTED:
            slot_weight = tl.load(weight_ptr + slots, mask=slots < SLOTS, other=0.0).to(tl.float32)
        used = tl.where(per_slot > 0.0, slot_weight, 0.0)
        share = _divide(used, tl.sum(used, 0))
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        places, exists, target, valid, weight = _weights(
            target_ptr, weight_ptr, rows, slots, N, ignore_index, weight_stride, SLOTS, WEIGHTED
        )
        c = weight
        if REDUCTION == 1:
            c = _divide(weight, tl.sum(per_slot, 0))
        elif REDUCTION == 2:
            c = _divide(tl.where(valid, share[None, :], 0.0), per_slot[None, :])
        tl.store(c_ptr + places, c, mask=exists)
        kept = target
        if not EVERY_LOSS:
            kept = tl.where(weight != 0.0, target, ignore_index)
        tl.store(kept_ptr + places, kept, mask=exists)


@triton.jit
def weighted_sum_kernel(
    losses_ptr,  # (N K), fp32
    c_ptr,  # (N K), fp32
    total_ptr,  # ()
    elements,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, elements, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        c = tl.load(c_ptr + offsets, mask=offsets < elements, other=0.0)
        loss = tl.load(losses_ptr + offsets, mask=c != 0.0, other=0.0)
        total += c * loss
    tl.store(total_ptr, tl.sum(total, 0))
