"""Triton kernel of K-token cross entropy: one program a row of logits, whatever K is.

    pass 1   lse = log sum exp z, online in fp32;   l_k = lse - z[t_k]
    pass 2   dz  = (sum_k c_k) softmax(z),          then the K targets' entries, in fp32 before the one rounding

Either pass can be left out: the loss alone, the gradient from a given lse, or both in one launch, over the logits
themselves if they are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096  # elements of a row a program holds at a time
NUM_WARPS = 8  # for a block of MAX_BLOCK: 16 values a thread; with more, ptxas spills


def launch_config(vocab: int) -> dict[str, int]:
    """``BLOCK_V`` and ``num_warps`` for rows of ``vocab`` logits."""
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK_V": block, "num_warps": max(1, NUM_WARPS * block // MAX_BLOCK)}


def loss(logits: Tensor, target: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """``l (N, K)`` and ``lse (N)``, fp32, of logits ``(N, V)``, which are read once and not written."""
    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(len(target), dtype=torch.float32, device=logits.device)
    _launch(_unit_stride(logits), target, None, losses, lse, None, options, needs_lse=True)
    return losses, lse


def logits_gradient(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, options: Any) -> Tensor:
    """dlogits ``(N, V)``, in the dtype of the logits, for ``c = grad (N, K)`` and the forward's ``lse``."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(_unit_stride(logits), target, grad, None, lse, dlogits, options, needs_lse=False)
    return dlogits


def loss_and_gradient_(logits: Tensor, target: Tensor, c: Tensor | None, losses: Tensor, options: Any) -> None:
    """Fills ``losses``; with ``c (N, K)`` the logits become dlogits in place. Rows may be padded (stride > V)."""
    lse = torch.empty(len(target), dtype=torch.float32, device=logits.device)
    _launch(logits, target, c, losses, lse, None if c is None else logits, options, needs_lse=True)


def slice_statistics_(
    logits: Tensor, first: int, target: Tensor, statistics: Tensor, picked: Tensor, options: Any
) -> None:
    """Goes on with ``statistics (3, N)``, fp32: max z, sum exp(z - max), sum z, over the classes from ``first`` on.

    Their logits ``(N, v)`` are given; those of targets among them are written to ``picked (N, K)``.
    """
    rows, columns = logits.shape
    if rows:
        slice_statistics_kernel[(rows,)](
            logits, target, statistics, picked, logits.stride(0), first, columns, _readable(columns, logits), rows,
            options.ignore_index, options.softcap or 1.0,
            SLOTS=target.shape[1], BLOCK_K=triton.next_power_of_2(target.shape[1]),
            SMOOTHING=options.label_smoothing > 0, SOFTCAP=options.softcap is not None, **launch_config(columns),
        )  # fmt: skip


def slice_gradient_(
    logits: Tensor, first: int, vocab: int, target: Tensor, c: Tensor, lse: Tensor, options: Any
) -> None:
    """The logits ``(N, v)`` of the classes from ``first`` on become their dlogits, in place."""
    _launch(logits, target, c, None, lse, logits, options, needs_lse=False, first=first, vocab=vocab)


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch(
    logits: Tensor,
    target: Tensor,
    c: Tensor | None,
    losses: Tensor | None,
    lse: Tensor,
    dlogits: Tensor | None,
    options: Any,
    *,
    needs_lse: bool,
    first: int = 0,
    vocab: int | None = None,
) -> None:
    rows, columns = logits.shape
    if rows == 0:
        return
    slots = target.shape[1]
    target = target.contiguous()
    c = None if c is None else c.contiguous()
    patch_cross_entropy_kernel[(rows,)](
        logits,
        target,
        c if c is not None else lse,
        losses if losses is not None else lse,
        lse,
        dlogits if dlogits is not None else logits,
        logits.stride(0),
        logits.stride(0) if dlogits is None else dlogits.stride(0),
        first,
        columns,
        vocab or columns,
        _readable(columns, logits, dlogits),
        options.ignore_index,
        options.label_smoothing,
        options.softcap or 1.0,
        options.z_loss_weight,
        SLOTS=slots,
        BLOCK_K=triton.next_power_of_2(slots),
        NEEDS_LSE=needs_lse,
        NEEDS_GRAD=dlogits is not None,
        SMOOTHING=options.label_smoothing > 0,
        SOFTCAP=options.softcap is not None,
        **launch_config(columns),
    )


def _readable(columns: int, *tensors: Tensor | None) -> int:
    """Where all strides leave room, whole vectors are moved past the last class and masked in registers."""
    padded = -(-columns // 16) * 16
    strides = [t.stride(0) for t in tensors if t is not None]
    return padded if all(stride % 16 == 0 and stride >= padded for stride in strides) else columns


@triton.jit
def _tanh(x):
    # 1 - e cancels near 0; there, the continued fraction to x^7 (Lambert), within 1e-9 below 1
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = tl.minimum(x * x, 1.0)
    near = x * (135135.0 + s * (17325.0 + s * (378.0 + s))) / (135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    return tl.where(tl.abs(x) < 1.0, near, tl.where(x < 0, -far, far))


@triton.jit
def _online_softmax(
    logits_ptr,
    largest,
    total,
    sum_z,
    V,
    end,  # V, or 0 to read nothing
    readable,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Goes on with a row's ``max z``, ``sum exp(z - max)`` and (with SMOOTHING) ``sum z`` over more columns."""
    for start in range(0, end, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * _tanh(z / softcap)
        if SMOOTHING:
            sum_z += tl.sum(tl.where(offsets < V, z, 0.0), 0)
        z = tl.where(offsets < V, z, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(z, 0))
        # a row that so far holds nothing but -inf has no finite shift
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), 0)
        largest = new_largest
    return largest, total, sum_z


@triton.jit(do_not_specialize=["first", "vocab", "ignore_index", "label_smoothing", "softcap", "z_loss_weight"])
def patch_cross_entropy_kernel(
    logits_ptr,  # (N, V), unit stride along V
    target_ptr,  # (N, K)
    c_ptr,  # (N, K), dL/dl
    losses_ptr,  # (N, K), fp32
    lse_ptr,  # (N), fp32: written if NEEDS_LSE, read if not
    dlogits_ptr,  # (N, V), may be the logits
    logits_stride,
    dlogits_stride,
    first,  # the class of the first column
    V,  # columns
    vocab,  # classes; more than columns where these are a slice, which NEEDS_LSE excludes
    readable,  # V, or V rounded up to 16 where rows are padded
    ignore_index,
    label_smoothing,
    softcap,
    z_loss_weight,
    SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEEDS_LSE: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V may pass 2^31
    logits_ptr += row * logits_stride
    dlogits_ptr += row * dlogits_stride

    slots = tl.arange(0, BLOCK_K)
    target = tl.load(target_ptr + row * SLOTS + slots, mask=slots < SLOTS, other=ignore_index).to(tl.int64)
    valid = target != ignore_index
    place = target - first
    inside = valid & (place >= 0) & (place < V)  # anything else is never dereferenced
    picked = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        picked_tanh = _tanh(picked / softcap)
        picked = softcap * picked_tanh

    # A row without a valid target is neither read nor exponentiated.
    used = tl.sum(valid.to(tl.int32), 0) > 0
    end = tl.where(used, V, 0)

    if NEEDS_LSE:
        zero = tl.full((), 0.0, tl.float32)
        largest, total, sum_z = _online_softmax(
            logits_ptr, zero - float("inf"), zero, zero, V, end, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V
        )
        lse = tl.where(used, largest + tl.log(total), 0.0)
        loss = lse - picked
        if SMOOTHING:
            loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - sum_z / V)
        loss += z_loss_weight * lse * lse
        loss = tl.where(inside, loss, tl.where(valid, float("nan"), 0.0))
        tl.store(losses_ptr + row * SLOTS + slots, loss, mask=slots < SLOTS)
        tl.store(lse_ptr + row, lse)
    else:
        lse = tl.load(lse_ptr + row)

    if NEEDS_GRAD:
        c = tl.load(c_ptr + row * SLOTS + slots, mask=valid & (slots < SLOTS), other=0.0).to(tl.float32)
        total_c = tl.sum(c, 0)
        factor = total_c * (1.0 + 2.0 * z_loss_weight * lse)
        shared = total_c * label_smoothing / vocab
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            if used:
                z = tl.load(logits_ptr + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
                if SOFTCAP:
                    t = _tanh(z / softcap)
                    dz = (factor * tl.exp(softcap * t - lse) - shared) * (1.0 - t * t)
                else:
                    dz = factor * tl.exp(z - lse) - shared
            else:
                dz = tl.zeros((BLOCK_V,), tl.float32)
            tl.store(dlogits_ptr + offsets, dz.to(dlogits_ptr.dtype.element_ty), mask=offsets < readable)

        # The targets' entries once more, whole and in fp32: p - c is formed before it is rounded, repeated targets
        # add up (each of them writes the same sum). The barrier orders these stores behind the other threads'.
        same = (target[:, None] == target[None, :]) & inside[None, :]
        at_target = tl.sum(tl.where(same, c[None, :], 0.0), 1) * (1.0 - label_smoothing)
        dz = factor * tl.exp(picked - lse) - shared - at_target
        if SOFTCAP:
            dz *= 1.0 - picked_tanh * picked_tanh
        tl.debug_barrier()
        tl.store(dlogits_ptr + place, dz.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "rows", "ignore_index", "softcap"])
def slice_statistics_kernel(
    logits_ptr,  # (N, v), unit stride along v
    target_ptr,  # (N, K)
    statistics_ptr,  # (3, N), fp32: max z, sum exp(z - max), sum z
    picked_ptr,  # (N, K), fp32
    logits_stride,
    first,  # the class of the first column
    V,  # columns
    readable,
    rows,
    ignore_index,
    softcap,
    SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    slots = tl.arange(0, BLOCK_K)
    target = tl.load(target_ptr + row * SLOTS + slots, mask=slots < SLOTS, other=ignore_index).to(tl.int64)
    place = target - first
    inside = (target != ignore_index) & (place >= 0) & (place < V)
    picked = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        picked = softcap * _tanh(picked / softcap)
    tl.store(picked_ptr + row * SLOTS + slots, picked, mask=inside)

    largest = tl.load(statistics_ptr + row)
    total = tl.load(statistics_ptr + rows + row)
    sum_z = tl.load(statistics_ptr + 2 * rows + row)
    largest, total, sum_z = _online_softmax(
        logits_ptr, largest, total, sum_z, V, V, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V
    )
    tl.store(statistics_ptr + row, largest)
    tl.store(statistics_ptr + rows + row, total)
    tl.store(statistics_ptr + 2 * rows + row, sum_z)
