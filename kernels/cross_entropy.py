"""Triton kernels of K-token cross entropy: one program per row of logits, whatever K is.

    pass 1   lse = log sum exp z, online in fp32;   l_k = lse - z[t_k]
    pass 2   dz  = (sum_k c_k) softmax(z),          then the K targets' entries, computed in fp32 and rounded once

A launch runs one of the passes or both. The gradient may overwrite the logits if they are the library's own buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkernels.numerics import LossOptions

MAX_BLOCK = 4096  # elements of a row that a program holds at a time
NUM_WARPS = 8  # for a block of MAX_BLOCK: 16 values per thread; with more values, ptxas spills registers
ROW_ALIGNMENT = 16  # elements; rows that begin at multiples of it are read in whole vectors, whatever V is


def launch_config(vocab: int) -> dict[str, int]:
    """``BLOCK_V`` and ``num_warps`` for rows of ``vocab`` logits."""
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK_V": block, "num_warps": max(1, NUM_WARPS * block // MAX_BLOCK)}


def loss(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # l (N, K), lse (N)
    """Losses and log-sum-exp in fp32. The logits are read once and stay unchanged."""
    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(len(target), dtype=torch.float32, device=logits.device)
    _launch(_unit_stride(logits), target, None, losses, lse, None, options, needs_lse=True)
    return losses, lse


def logits_gradient(
    c: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    lse: Tensor,  # (N)
    options: LossOptions,
) -> Tensor:  # (N, V)
    """dlogits, in the dtype of the logits, which stay unchanged."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(_unit_stride(logits), target, c, None, lse, dlogits, options, needs_lse=False)
    return dlogits


def loss_and_gradient_(
    logits: Tensor,  # (N, V), a buffer of the library; rows may be padded (stride > V)
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    losses: Tensor,  # (N, K), fp32
    options: LossOptions,
) -> Tensor | None:  # (N, V)
    """Fills ``losses``; with ``c`` also overwrites the logits with dlogits and returns them."""
    lse = torch.empty(len(target), dtype=torch.float32, device=logits.device)
    dlogits = None if c is None else logits
    _launch(logits, target, c, losses, lse, dlogits, options, needs_lse=True)
    return dlogits


def slice_statistics_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (3, N), fp32: max z, sum exp(z - max), sum z
    picked: Tensor,  # (N, K), fp32, the logits of the targets
    options: LossOptions,
    *,
    keep_logits: bool,  # makes no difference here: the kernel never writes the logits
) -> None:
    """Updates the statistics of the rows with the logits of more classes."""
    rows, columns = logits.shape
    if rows:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            slice_statistics_kernel[(rows,)](
                logits, target, statistics, picked, logits.stride(0), first, columns, _readable(columns, logits), rows,
                options.ignore_index, options.softcap or 1.0,
                SLOTS=target.shape[1], BLOCK_K=triton.next_power_of_2(target.shape[1]),
                SMOOTHING=options.label_smoothing > 0, SOFTCAP=options.softcap is not None, **launch_config(columns),
            )  # fmt: skip


def slice_gradient_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    vocab: int,
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    lse: Tensor,  # (N), over the whole vocabulary
    options: LossOptions,
) -> Tensor:  # (N, v)
    """Overwrites the logits of these classes with their dlogits and returns them."""
    _launch(logits, target, c, None, lse, logits, options, needs_lse=False, first=first, vocab=vocab)
    return logits


def logits_buffer(rows: int, weight: Tensor) -> Tensor:  # (rows, V)
    """Memory for the logits of some rows. Rows are padded, so that each begins at an aligned address."""
    vocab = len(weight)
    return weight.new_empty(rows, triton.cdiv(vocab, ROW_ALIGNMENT) * ROW_ALIGNMENT)[:, :vocab]


def bytes_per_logit(dtype: torch.dtype, options: LossOptions) -> int:
    """Bytes needed for a logit of a slice. The kernels work in place, so only the logit itself."""
    return dtype.itemsize


def check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Does nothing: the kernels give a target outside [0, V) the loss NaN and read no memory out of bounds."""


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch(
    logits: Tensor,
    target: Tensor,
    c: Tensor | None,
    losses: Tensor | None,
    lse: Tensor,
    dlogits: Tensor | None,
    options: LossOptions,
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
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        patch_cross_entropy_kernel[(rows,)](
            logits, target,
            c if c is not None else lse,  # Triton needs a tensor for every pointer, even for an unused one
            losses if losses is not None else lse,
            lse,
            dlogits if dlogits is not None else logits,
            logits.stride(0), logits.stride(0) if dlogits is None else dlogits.stride(0),
            first, columns, vocab or columns, _readable(columns, logits, dlogits),
            options.ignore_index, options.label_smoothing, options.softcap or 1.0, options.z_loss_weight,
            SLOTS=slots, BLOCK_K=triton.next_power_of_2(slots), NEEDS_LSE=needs_lse, NEEDS_GRAD=dlogits is not None,
            SMOOTHING=options.label_smoothing > 0, SOFTCAP=options.softcap is not None, **launch_config(columns),
        )  # fmt: skip


def _readable(columns: int, *tensors: Tensor | None) -> int:
    """Columns that a load may touch: V, or V rounded up where every row has so much room, the last one included.

    Padding is read into, so that loads stay vectorised at any V; the kernel masks what it finds there.
    """
    padded = triton.cdiv(columns, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return padded if all(_has_room(t, padded) for t in tensors if t is not None) else columns


def _has_room(tensor: Tensor, columns: int) -> bool:
    """Whether each row of ``tensor`` begins on an aligned element and has ``columns`` elements before the next one."""
    stride = tensor.stride(0)
    end = tensor.storage_offset() + (len(tensor) - 1) * stride + columns
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return stride % ROW_ALIGNMENT == 0 and stride >= columns and end <= elements


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) loses its digits near 0. Below 1, Lambert's continued fraction to x^7 is exact to 1e-9.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = tl.minimum(x * x, 1.0)
    near = x * (135135.0 + s * (17325.0 + s * (378.0 + s))) / (135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    return tl.where(tl.abs(x) < 1.0, near, tl.where(x < 0, -far, far))


@triton.jit
def _load_targets(
    logits_ptr,
    target_ptr,
    slots,
    first,
    V,
    ignore_index,
    softcap,
    SLOTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Loads the targets of a row.

    Returns for each target its class, whether it is valid (not ignored), its column, whether that column is one of the
    V here, its logit, and the slope of the soft cap at that logit.
    """
    target = tl.load(target_ptr + slots, mask=slots < SLOTS, other=ignore_index).to(tl.int64)
    valid = target != ignore_index
    column = target - first
    inside = valid & (column >= 0) & (column < V)  # only these columns are read and written
    picked = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        t = _tanh(picked / softcap)
        picked = softcap * t
        slope = 1.0 - t * t
    return target, valid, column, inside, picked, slope


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
    """Updates a row's ``max z``, ``sum exp(z - max)`` and (with SMOOTHING) ``sum z`` with more columns."""
    for start in range(0, end, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * _tanh(z / softcap)
        if SMOOTHING:
            sum_z += tl.sum(tl.where(offsets < V, z, 0.0), 0)
        z = tl.where(offsets < V, z, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(z, 0))
        # while a row holds nothing but -inf, subtracting its maximum would give NaN
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), 0)
        largest = new_largest
    return largest, total, sum_z


@triton.jit
def _losses(lse, picked, mean, inside, valid, label_smoothing, z_loss_weight, SMOOTHING: tl.constexpr):
    """The loss of each target of a row: 0 where it is ignored, NaN where it is outside [0, V)."""
    loss = lse - picked
    if SMOOTHING:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - mean)
    loss += z_loss_weight * lse * lse
    return tl.where(inside, loss, tl.where(valid, float("nan"), 0.0))


@triton.jit
def _store_softmax_gradient(
    logits_ptr,
    dlogits_ptr,
    factor,  # multiplies the softmax
    shared,  # what label smoothing subtracts for every class
    lse,
    used,  # False: the row has no valid target and its gradient is 0
    V,
    readable,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Stores ``factor softmax(z) - shared``, times the slope of the soft cap, for every column of a row."""
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


@triton.jit
def _store_target_gradient(dlogits_ptr, target, column, inside, c, picked, slope, factor, shared, lse, label_smoothing):
    """Overwrites the gradient in the targets' columns with the complete value, computed in fp32 and rounded once.

    The gradients of repeated targets add up, and each of them stores the same sum. The barrier makes these stores come
    after those of :func:`_store_softmax_gradient` to the same columns, which other threads made.
    """
    same = (target[:, None] == target[None, :]) & inside[None, :]
    at_target = tl.sum(tl.where(same, c[None, :], 0.0), 1) * (1.0 - label_smoothing)
    dz = (factor * tl.exp(picked - lse) - shared - at_target) * slope
    tl.debug_barrier()
    tl.store(dlogits_ptr + column, dz.to(dlogits_ptr.dtype.element_ty), mask=inside)


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
    vocab,  # classes in all; more than V for a slice, and NEEDS_LSE must then be False
    readable,  # columns that a load may touch: V, or more where rows are padded
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
    row = tl.program_id(0).to(tl.int64)  # N * V may exceed 2^31
    logits_ptr += row * logits_stride
    dlogits_ptr += row * dlogits_stride

    slots = tl.arange(0, BLOCK_K)
    target, valid, column, inside, picked, slope = _load_targets(
        logits_ptr, target_ptr + row * SLOTS, slots, first, V, ignore_index, softcap, SLOTS, SOFTCAP
    )

    # The logits of a row without a valid target are not read: its losses and its gradient are 0.
    used = tl.sum(valid.to(tl.int32), 0) > 0
    end = tl.where(used, V, 0)

    if NEEDS_LSE:
        zero = tl.full((), 0.0, tl.float32)
        largest, total, sum_z = _online_softmax(
            logits_ptr, zero - float("inf"), zero, zero, V, end, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V
        )
        lse = tl.where(used, largest + tl.log(total), 0.0)
        loss = _losses(lse, picked, sum_z / V, inside, valid, label_smoothing, z_loss_weight, SMOOTHING)
        tl.store(losses_ptr + row * SLOTS + slots, loss, mask=slots < SLOTS)
        tl.store(lse_ptr + row, lse)
    else:
        lse = tl.load(lse_ptr + row)
        # In place, a target's logit must be read by all warps before one of them overwrites it. The reductions of the
        # other branch are such a barrier; here there is none.
        tl.debug_barrier()

    if NEEDS_GRAD:
        c = tl.load(c_ptr + row * SLOTS + slots, mask=valid & (slots < SLOTS), other=0.0).to(tl.float32)
        total_c = tl.sum(c, 0)
        factor = total_c * (1.0 + 2.0 * z_loss_weight * lse)
        shared = total_c * label_smoothing / vocab
        _store_softmax_gradient(
            logits_ptr, dlogits_ptr, factor, shared, lse, used, V, readable, softcap, SOFTCAP, BLOCK_V
        )

        _store_target_gradient(
            dlogits_ptr, target, column, inside, c, picked, slope, factor, shared, lse, label_smoothing
        )


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
    _target, _valid, _column, inside, picked, _slope = _load_targets(
        logits_ptr, target_ptr + row * SLOTS, slots, first, V, ignore_index, softcap, SLOTS, SOFTCAP
    )
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
