"""What a program of the cross entropy kernels computes for its row of logits: the passes, and the targets."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
ACCURATE_SOFTCAP = tl.constexpr(2)  # SOFTCAP is 0 without one, 1 where an error of 1e-6 of it does no harm, or this


@triton.jit
def exp(x):
    """``e^x``, and 0 below 1e-38. There ``tl.exp`` is not 0, which costs three instructions more for every x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def inverse(a, PAIRS: tl.constexpr):
    """``1 / a`` for a from 1 to 1e18. With PAIRS two neighbours share the slow instruction: 1 / a = b (1 / (a b))."""
    if PAIRS:
        first, second = tl.split(tl.reshape(a, (a.shape[0] // 2, 2)))
        root = tl.rsqrt(first * second)
        product_inverse = root * root
        result = tl.reshape(tl.join(product_inverse * second, product_inverse * first), a.shape)
    else:
        root = tl.rsqrt(a)
        result = root * root
    return result


@triton.jit
def tanh(z, softcap, PAIRS: tl.constexpr, ACCURATE: tl.constexpr):
    """``tanh(z / softcap) = 1 - 2 / (exp(2 z / softcap) + 1)``, to 1e-6.

    ACCURATE: to 6e-7 of its value, by a polynomial near 0, fitted to ``(tanh(x) / x - 1) / x^2``.
    """
    exponent = z * (1.0 / softcap * (2.0 * LOG2_E))
    if ACCURATE:
        exponent = tl.abs(exponent)
    exponent = tl.minimum(exponent, 60.0, propagate_nan=tl.PropagateNan.ALL)  # from 30 on tanh is 1 in fp32
    result = 1.0 - 2.0 * inverse(tl.exp2(exponent) + 1.0, PAIRS)
    if ACCURATE:
        x = z * (1.0 / softcap)
        s = x * x
        near = x + x * s * (-0.333333116 + s * (0.133305137 + s * (-0.0533910552 + s * 0.0179992216)))
        result = tl.where(s < 0.25, near, tl.where(x < 0, -result, result))
    return result


@triton.jit
def has_target(target_ptr, slots, ignore_index, SLOTS: tl.constexpr):
    """Whether a row has a target that is not ignored."""
    target = tl.load(target_ptr + slots, mask=slots < SLOTS, other=ignore_index).to(tl.int64)
    return tl.sum((target != ignore_index).to(tl.int32), 0) > 0


@triton.jit
def load_targets(
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
        t = tanh(picked, softcap, False, SOFTCAP == ACCURATE_SOFTCAP)
        picked = softcap * t
        slope = 1.0 - t * t
    return valid, column, picked, slope


@triton.jit
def online_softmax(
    logits_ptr, V, end, readable, softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """``max z``, ``sum exp(z - max)`` and (with SMOOTHING) ``sum (z - max)`` of a row; ``end`` is V, or 0 for none."""
    zero = tl.full((), 0.0, tl.float32)
    largest, total, below = zero - float("inf"), zero, zero
    for start in range(0, end, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = tl.where(offsets < V, z, 0.0)  # neighbours share an inverse, so that padding would spoil a logit
            z = softcap * tanh(z, softcap, True, SOFTCAP == ACCURATE_SOFTCAP)
        z = tl.where(offsets < V, z, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(z, 0))
        shift, moved = move_maximum(largest, new_largest)
        z -= shift
        if SMOOTHING:
            below += start * moved + tl.sum(tl.where(offsets < V, z, 0.0), 0)
        total = total * exp(moved) + tl.sum(exp(z), 0)
        largest = new_largest
    return largest, total, below


@triton.jit
def used_softmax(
    logits_ptr, V, used, readable, softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The same; the logits of a row that is not used, because it has no valid target, are not read."""
    end = tl.where(used, V, 0)
    largest, total, below = online_softmax(logits_ptr, V, end, readable, softcap, SMOOTHING, SOFTCAP, BLOCK_V)
    return tl.where(used, largest, 0.0), tl.where(used, total, 1.0), below


@triton.jit
def move_maximum(largest, new_largest):
    """What to subtract from logits for a new maximum, and what to add to differences from the former one.

    Both are 0 where a maximum is -inf, since -inf - -inf is NaN. Sums over such columns are 0 or -inf and stay so.
    """
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    moved = tl.where(largest == float("-inf"), 0.0, largest - shift)
    return shift, moved


@triton.jit
def target_losses(
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
def factors(c, largest, total, log_total, vocab, label_smoothing, z_loss_weight):
    """What multiplies ``exp(z - max)`` in a row's gradient, and what label smoothing subtracts for every class."""
    total_c = tl.sum(c, 0)
    return total_c * (1.0 + 2.0 * z_loss_weight * (largest + log_total)) / total, total_c * label_smoothing / vocab


@triton.jit
def store_softmax_gradient(
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
                z = tl.where(offsets < V, z, 0.0)
                t = tanh(z, softcap, True, SOFTCAP == ACCURATE_SOFTCAP)
                p = tl.exp2(t * (softcap * LOG2_E) - largest * LOG2_E)
                dz = (factor * p - shared) * (1.0 - t * t)
            else:
                dz = factor * exp(z - largest) - shared
        else:
            dz = tl.zeros((BLOCK_V,), tl.float32)
        tl.store(dlogits_ptr + offsets, dz.to(dlogits_ptr.dtype.element_ty), mask=offsets < readable)


@triton.jit
def target_gradient(column, c, picked, slope, factor, shared, largest, used, label_smoothing):
    """The complete gradient in the targets' columns, in fp32. Where a target is repeated, each has the same sum."""
    same = column[:, None] == column[None, :]
    at_target = tl.sum(tl.where(same, c[None, :], 0.0), 1) * (1.0 - label_smoothing)
    return tl.where(used, (factor * exp(picked - largest) - shared - at_target) * slope, 0.0)
