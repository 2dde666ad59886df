"""Triton kernels of K-token cross entropy: one program per row of logits, whatever K is.

    pass 1   max z and s = sum exp(z - max), online in fp32;   l_k = (max - z[t_k]) + log s
    pass 2   dz = (sum_k c_k) exp(z - max) / s,   then the K targets' entries, computed in fp32 and rounded once

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
) -> tuple[Tensor, Tensor]:  # l (N, K); max z and sum exp(z - max) (2, N)
    """Losses and the statistics that the gradient needs, in fp32. The logits are read once and stay unchanged."""
    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(2, len(target), dtype=torch.float32, device=logits.device)
    _launch(_unit_stride(logits), target, None, losses, statistics, None, options)
    return losses, statistics


def logits_gradient(
    c: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (2, N): max z, sum exp(z - max)
    options: LossOptions,
) -> Tensor:  # (N, V)
    """dlogits, in the dtype of the logits, which stay unchanged."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(_unit_stride(logits), target, c, None, statistics, dlogits, options)
    return dlogits


def loss_and_gradient_(
    logits: Tensor,  # (N, V), a buffer of the library; rows may be padded (stride > V)
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    losses: Tensor,  # (N, K), fp32
    options: LossOptions,
) -> Tensor | None:  # (N, V)
    """Fills ``losses``; with ``c`` also overwrites the logits with dlogits and returns them."""
    statistics = torch.empty(2, len(target), dtype=torch.float32, device=logits.device)
    dlogits = None if c is None else logits
    _launch(logits, target, c, losses, statistics, dlogits, options)
    return dlogits


def slice_statistics_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (3, N), of the classes before ``first`` or of none; see :func:`numerics.new_statistics`
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
                logits, target, statistics, picked, logits.stride(0), first, columns, _readable(columns, logits),
                options.ignore_index, options.softcap or 1.0,
                SLOTS=target.shape[1], BLOCK_K=triton.next_power_of_2(target.shape[1]),
                SMOOTHING=options.label_smoothing > 0, SOFTCAP=options.softcap is not None, **launch_config(columns),
                enable_fp_fusion=True,
            )  # fmt: skip


def slice_gradient_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    vocab: int,
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    statistics: Tensor,  # (2, N), fp32: max z and sum exp(z - max) over the whole vocabulary
    options: LossOptions,
) -> Tensor:  # (N, v)
    """Overwrites the logits of these classes with their dlogits and returns them."""
    _launch(logits, target, c, None, statistics, logits, options, first=first, vocab=vocab)
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
    statistics: Tensor,
    dlogits: Tensor | None,
    options: LossOptions,
    *,
    first: int = 0,
    vocab: int | None = None,
) -> None:
    rows, columns = logits.shape
    if rows == 0:
        return
    slots = target.shape[1]
    statistics = statistics.contiguous()
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        patch_cross_entropy_kernel[(rows,)](
            logits, target.contiguous(),
            c.contiguous() if c is not None else statistics,  # Triton needs a tensor for an unused pointer too
            losses if losses is not None else statistics,
            statistics,
            dlogits if dlogits is not None else logits,
            logits.stride(0), logits.stride(0) if dlogits is None else dlogits.stride(0),
            first, columns, vocab or columns, _readable(columns, logits, dlogits),
            options.ignore_index, options.label_smoothing, options.softcap or 1.0, options.z_loss_weight,
            SLOTS=slots, BLOCK_K=triton.next_power_of_2(slots), NEEDS_LOSS=losses is not None,
            NEEDS_GRAD=dlogits is not None, SMOOTHING=options.label_smoothing > 0,
            SOFTCAP=options.softcap is not None, **launch_config(columns), enable_fp_fusion=True,
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
def _has_target(target_ptr, slots, ignore_index, SLOTS: tl.constexpr):
    """Whether a row has a target that is not ignored."""
    target = tl.load(target_ptr + slots, mask=slots < SLOTS, other=ignore_index).to(tl.int64)
    return tl.sum((target != ignore_index).to(tl.int32), 0) > 0


@triton.jit
def _load_targets(
    logits_ptr, target_ptr, slots, first, V, ignore_index, softcap, SLOTS: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Loads the targets of a row.

    Returns for each target whether it is valid (not ignored), its column, or -1 if it is ignored or not one of the V
    columns here, its logit, and the slope of the soft cap at that logit.
    """
    target = tl.load(target_ptr + slots, mask=slots < SLOTS, other=ignore_index).to(tl.int64)
    valid = target != ignore_index
    column = target - first
    column = tl.where(valid & (column >= 0) & (column < V), column, -1).to(tl.int32)
    picked = tl.load(logits_ptr + column, mask=column >= 0, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        t = _tanh(picked / softcap)
        picked = softcap * t
        slope = 1.0 - t * t
    return valid, column, picked, slope


@triton.jit
def _online_softmax(
    logits_ptr, V, end, readable, softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """``max z``, ``sum exp(z - max)`` and (with SMOOTHING) ``sum (z - max)`` of a row; ``end`` is V, or 0 for none."""
    zero = tl.full((), 0.0, tl.float32)
    largest, total, below = zero - float("inf"), zero, zero
    for start in range(0, end, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * _tanh(z / softcap)
        z = tl.where(offsets < V, z, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(z, 0))
        shift, moved = _move_maximum(largest, new_largest)
        z -= shift
        if SMOOTHING:
            below += start * moved + tl.sum(tl.where(offsets < V, z, 0.0), 0)
        total = total * tl.exp(moved) + tl.sum(tl.exp(z), 0)
        largest = new_largest
    return largest, total, below


@triton.jit
def _move_maximum(largest, new_largest):
    """What to subtract from logits for a new maximum, and what to add to differences from the former one.

    Both are 0 where a maximum is -inf, since -inf - -inf is NaN. Sums over such columns are 0 or -inf and stay so.
    """
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    moved = tl.where(largest == float("-inf"), 0.0, largest - shift)
    return shift, moved


@triton.jit
def _losses(
    largest, log_total, mean_below, picked, column, valid, label_smoothing, z_loss_weight, SMOOTHING: tl.constexpr
):
    """The loss of each target of a row: 0 where it is ignored, NaN where it is outside [0, V).

    ``mean_below`` is the mean of ``z - max``. Differences from the maximum come first: log-sum-exp, rounded at logits
    of 1e4, would be off by 5e-4.
    """
    loss = largest - picked
    if SMOOTHING:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * mean_below
    lse = largest + log_total
    loss += log_total + z_loss_weight * lse * lse
    return tl.where(column >= 0, loss, tl.where(valid, float("nan"), 0.0))


@triton.jit
def _factors(c, largest, total, log_total, vocab, label_smoothing, z_loss_weight):
    """What multiplies ``exp(z - max)`` in a row's gradient, and what label smoothing subtracts for every class."""
    total_c = tl.sum(c, 0)
    return total_c * (1.0 + 2.0 * z_loss_weight * (largest + log_total)) / total, total_c * label_smoothing / vocab


@triton.jit
def _store_softmax_gradient(
    logits_ptr,
    dlogits_ptr,
    factor,
    shared,
    largest,
    used,  # False: all c of the row are 0, and so is its gradient, whatever the logits are
    V,
    readable,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Stores ``factor exp(z - max) - shared``, times the slope of the soft cap, for every column of a row."""
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        if used:
            z = tl.load(logits_ptr + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
            if SOFTCAP:
                t = _tanh(z / softcap)
                dz = (factor * tl.exp(softcap * t - largest) - shared) * (1.0 - t * t)
            else:
                dz = factor * tl.exp(z - largest) - shared
        else:
            dz = tl.zeros((BLOCK_V,), tl.float32)
        tl.store(dlogits_ptr + offsets, dz.to(dlogits_ptr.dtype.element_ty), mask=offsets < readable)


@triton.jit
def _target_gradient(column, c, picked, slope, factor, shared, largest, used, label_smoothing):
    """The complete gradient in the targets' columns, in fp32. Where a target is repeated, each has the same sum."""
    same = column[:, None] == column[None, :]
    at_target = tl.sum(tl.where(same, c[None, :], 0.0), 1) * (1.0 - label_smoothing)
    return tl.where(used, (factor * tl.exp(picked - largest) - shared - at_target) * slope, 0.0)


@triton.jit(do_not_specialize=["first", "vocab", "ignore_index", "label_smoothing", "softcap", "z_loss_weight"])
def patch_cross_entropy_kernel(
    logits_ptr,  # (N, V), unit stride along V
    target_ptr,  # (N, K)
    c_ptr,  # (N, K), dL/dl
    losses_ptr,  # (N, K), fp32
    statistics_ptr,  # (2, N), fp32: max z, sum exp(z - max); written if NEEDS_LOSS, read if not
    dlogits_ptr,  # (N, V), may be the logits
    logits_stride,
    dlogits_stride,
    first,  # the class of the first column
    V,  # columns
    vocab,  # classes in all; more than V for a slice, and NEEDS_LOSS must then be False
    readable,  # columns that a load may touch: V, or more where rows are padded
    ignore_index,
    label_smoothing,
    softcap,
    z_loss_weight,
    SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEEDS_LOSS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V may exceed 2^31
    logits_ptr += row * logits_stride
    dlogits_ptr += row * dlogits_stride
    largest_ptr = statistics_ptr + row
    total_ptr = largest_ptr + tl.num_programs(0)
    slots = tl.arange(0, BLOCK_K)
    if NEEDS_LOSS:
        # The logits of a row without a valid target are not read: its losses are 0.
        used = _has_target(target_ptr + row * SLOTS, slots, ignore_index, SLOTS)
        end = tl.where(used, V, 0)
        largest, total, below = _online_softmax(logits_ptr, V, end, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V)
        largest, total = tl.where(used, largest, 0.0), tl.where(used, total, 1.0)
    else:
        largest, total = tl.load(largest_ptr), tl.load(total_ptr)
    log_total = tl.log(total)
    # After the loop, so that nothing of the targets takes registers in it.
    valid, column, picked, slope = _load_targets(
        logits_ptr, target_ptr + row * SLOTS, slots, first, V, ignore_index, softcap, SLOTS, SOFTCAP
    )
    if NEEDS_LOSS:
        loss = _losses(largest, log_total, below / V, picked, column, valid, label_smoothing, z_loss_weight, SMOOTHING)
        tl.store(losses_ptr + row * SLOTS + slots, loss, mask=slots < SLOTS)
        tl.store(largest_ptr, largest)
        tl.store(total_ptr, total)

    if NEEDS_GRAD:
        c = tl.load(c_ptr + row * SLOTS + slots, mask=valid & (slots < SLOTS), other=0.0).to(tl.float32)
        used = tl.sum((c != 0).to(tl.int32), 0) > 0
        factor, shared = _factors(c, largest, total, log_total, vocab, label_smoothing, z_loss_weight)
        at_targets = _target_gradient(column, c, picked, slope, factor, shared, largest, used, label_smoothing)
        # In place, a target's logit must be read by all warps before one of them overwrites it.
        tl.debug_barrier()
        _store_softmax_gradient(
            logits_ptr, dlogits_ptr, factor, shared, largest, used, V, readable, softcap, SOFTCAP, BLOCK_V
        )
        tl.debug_barrier()  # other threads have stored to the same columns
        tl.store(dlogits_ptr + column, at_targets.to(dlogits_ptr.dtype.element_ty), mask=column >= 0)


@triton.jit(do_not_specialize=["first", "ignore_index", "softcap"])
def slice_statistics_kernel(
    logits_ptr,  # (N, v), unit stride along v
    target_ptr,  # (N, K)
    statistics_ptr,  # (3, N), fp32: max z, sum exp(z - max), sum (z - max), of the classes before ``first`` or of none
    picked_ptr,  # (N, K), fp32
    logits_stride,
    first,  # the class of the first column
    V,  # columns
    readable,
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
    _valid, column, picked, _slope = _load_targets(
        logits_ptr, target_ptr + row * SLOTS, slots, first, V, ignore_index, softcap, SLOTS, SOFTCAP
    )
    tl.store(picked_ptr + row * SLOTS + slots, picked, mask=column >= 0)

    largest, total, below = _online_softmax(logits_ptr, V, V, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V)
    largest_ptr = statistics_ptr + row
    total_ptr = largest_ptr + tl.num_programs(0)
    below_ptr = total_ptr + tl.num_programs(0)
    former_largest, former_total, former_below = tl.load(largest_ptr), tl.load(total_ptr), tl.load(below_ptr)
    new_largest = tl.maximum(former_largest, largest)
    _, former_moved = _move_maximum(former_largest, new_largest)
    _, moved = _move_maximum(largest, new_largest)
    tl.debug_barrier()  # all warps must have read the former statistics before one of them overwrites them
    tl.store(largest_ptr, new_largest)
    tl.store(total_ptr, former_total * tl.exp(former_moved) + total * tl.exp(moved))
    if SMOOTHING:
        tl.store(below_ptr, (former_below + first * former_moved) + (below + V * moved))
