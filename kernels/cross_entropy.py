"""Triton kernels of K-token cross entropy: one program per row of logits, whatever K is.

    pass 1   max z and s = sum exp(z - max), online in fp32;   l_k = (max - z[t_k]) + log s
    pass 2   dz = (sum_k c_k) exp(z - max) / s,   then the K targets' entries, computed in fp32 and rounded once

A launch runs one of the passes or both. The gradient may overwrite the logits if they are the library's own buffer.

With both, a row is read twice. Only so many programs run that their rows fit the GPU's cache, and each goes from row to
row. The second reading finds its row in the cache: memory is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkernels.kernels.cross_entropy_rows import (
    ACCURATE_SOFTCAP,
    exp,
    factors,
    has_target,
    load_targets,
    move_maximum,
    online_softmax,
    store_softmax_gradient,
    target_gradient,
    target_losses,
    used_softmax,
)
from patchkernels.numerics import LossOptions

VALUES = 16  # of a row that a thread holds at a time; with more, ptxas spills registers
MAX_BLOCK = 4096  # columns that a program holds at a time, where several programs share a multiprocessor
CACHE_BYTES = 36 * 2**20  # for rows that are read twice: of 50 MB of L2 on an H100 or H200
MULTIPROCESSORS = 132  # of an H100 or H200
MOST_WARPS = 16  # with more, ptxas has too few registers for each thread
SMALL_SOFTCAP = 100.0
ROW_ALIGNMENT = 16  # elements; rows that begin at multiples of it are read in whole vectors, whatever V is


def programs_at_a_time(rows: int, row_bytes: int, passes: int, in_place: bool) -> int:
    """All rows at once, or as many as fit the cache if they are read twice.

    Gradients that are not written over the logits take the cache too.
    """
    return rows if passes == 1 else min(rows, max(CACHE_BYTES // (row_bytes if in_place else 2 * row_bytes), 1))


def launch_config(columns: int, rows: int, programs: int) -> dict[str, int]:
    """``BLOCK_V`` and ``num_warps``: the fewer programs share the rows, the more bytes each has on the way."""
    largest, most = MAX_BLOCK, 32 * VALUES * MOST_WARPS
    while programs < rows and largest < most and programs * largest < 4 * MAX_BLOCK * MULTIPROCESSORS:
        largest *= 2
    block = min(largest, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK_V": block, "num_warps": max(1, block // (32 * VALUES))}


def softcap_kind(softcap: float | None, dtype: torch.dtype) -> int:
    """The kernels' SOFTCAP. An error of 1e-6 of a small cap is far below the rounding of 16-bit logits."""
    if softcap is None:
        return 0
    return 1 if dtype.itemsize == 2 and softcap <= SMALL_SOFTCAP else ACCURATE_SOFTCAP.value


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


def loss_and_gradient(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # l (N, K); dlogits (N, V), in the dtype of the logits
    """Losses, in fp32, and dlogits. The logits stay unchanged."""
    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(2, len(target), dtype=torch.float32, device=logits.device)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(_unit_stride(logits), target, c, losses, statistics, dlogits, options)
    return losses, dlogits


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
                SMOOTHING=options.label_smoothing > 0, SOFTCAP=softcap_kind(options.softcap, logits.dtype),
                **launch_config(columns, rows, rows), enable_fp_fusion=True,
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
    passes = (losses is not None) + (dlogits is not None)
    programs = programs_at_a_time(rows, columns * logits.element_size(), passes, dlogits is logits)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        patch_cross_entropy_kernel[(programs,)](
            logits, target.contiguous(),
            c.contiguous() if c is not None else statistics,  # Triton needs a tensor for an unused pointer too
            losses if losses is not None else statistics,
            statistics,
            dlogits if dlogits is not None else logits,
            rows, logits.stride(0), logits.stride(0) if dlogits is None else dlogits.stride(0),
            first, columns, vocab or columns, _readable(columns, logits, dlogits),
            options.ignore_index, options.label_smoothing, options.softcap or 1.0, options.z_loss_weight,
            SLOTS=slots, BLOCK_K=triton.next_power_of_2(slots), NEEDS_LOSS=losses is not None,
            NEEDS_GRAD=dlogits is not None, SMOOTHING=options.label_smoothing > 0,
            SOFTCAP=softcap_kind(options.softcap, logits.dtype),
            **launch_config(columns, rows, programs), enable_fp_fusion=True,
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


@triton.jit(do_not_specialize=["N", "first", "vocab", "ignore_index", "label_smoothing", "softcap", "z_loss_weight"])
def patch_cross_entropy_kernel(
    logits_ptr,  # (N, V), unit stride along V
    target_ptr,  # (N, K)
    c_ptr,  # (N, K), dL/dl
    losses_ptr,  # (N, K), fp32
    statistics_ptr,  # (2, N), fp32: max z, sum exp(z - max); written if NEEDS_LOSS, read if not
    dlogits_ptr,  # (N, V), may be the logits
    N,
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
    slots = tl.arange(0, BLOCK_K)
    for program_row in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + program_row  # N * V may exceed 2^31
        z_ptr = logits_ptr + row * logits_stride
        dz_ptr = dlogits_ptr + row * dlogits_stride
        largest_ptr = statistics_ptr + row
        total_ptr = largest_ptr + N
        if NEEDS_LOSS:
            used = has_target(target_ptr + row * SLOTS, slots, ignore_index, SLOTS)
            largest, total, below = used_softmax(z_ptr, V, used, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V)
        else:
            largest, total = tl.load(largest_ptr), tl.load(total_ptr)
        log_total = tl.log(total)
        # After the loop, so that nothing of the targets takes registers in it.
        valid, column, picked, slope = load_targets(
            z_ptr, target_ptr + row * SLOTS, slots, first, V, ignore_index, softcap, SLOTS, SOFTCAP
        )
        if NEEDS_LOSS:
            loss = target_losses(
                largest, log_total, below / V, picked, column, valid, label_smoothing, z_loss_weight, SMOOTHING
            )
            tl.store(losses_ptr + row * SLOTS + slots, loss, mask=slots < SLOTS)
            tl.store(largest_ptr, largest)
            tl.store(total_ptr, total)

        if NEEDS_GRAD:
            c = tl.load(c_ptr + row * SLOTS + slots, mask=valid & (slots < SLOTS), other=0.0).to(tl.float32)
            used = tl.sum((c != 0).to(tl.int32), 0) > 0
            factor, shared = factors(c, largest, total, log_total, vocab, label_smoothing, z_loss_weight)
            at_targets = target_gradient(column, c, picked, slope, factor, shared, largest, used, label_smoothing)
            # In place, a target's logit must be read by all warps before one of them overwrites it.
            tl.debug_barrier()
            store_softmax_gradient(z_ptr, dz_ptr, factor, shared, largest, used, V, readable, softcap, SOFTCAP, BLOCK_V)
            tl.debug_barrier()  # other threads have stored to the same columns
            tl.store(dz_ptr + column, at_targets.to(dz_ptr.dtype.element_ty), mask=column >= 0)


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
    _valid, column, picked, _slope = load_targets(
        logits_ptr, target_ptr + row * SLOTS, slots, first, V, ignore_index, softcap, SLOTS, SOFTCAP
    )
    tl.store(picked_ptr + row * SLOTS + slots, picked, mask=column >= 0)

    largest, total, below = online_softmax(logits_ptr, V, V, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V)
    largest_ptr = statistics_ptr + row
    total_ptr = largest_ptr + tl.num_programs(0)
    below_ptr = total_ptr + tl.num_programs(0)
    former_largest, former_total, former_below = tl.load(largest_ptr), tl.load(total_ptr), tl.load(below_ptr)
    new_largest = tl.maximum(former_largest, largest)
    _, former_moved = move_maximum(former_largest, new_largest)
    _, moved = move_maximum(largest, new_largest)
    tl.debug_barrier()  # all warps must have read the former statistics before one of them overwrites them
    tl.store(largest_ptr, new_largest)
    tl.store(total_ptr, former_total * exp(former_moved) + total * exp(moved))
    if SMOOTHING:
        tl.store(below_ptr, (former_below + first * former_moved) + (below + V * moved))
