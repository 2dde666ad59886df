"""Floating-point formats and correct rounding in numpy, where numpy itself has no such operation.

A bfloat16 array holds its bits as ``uint16``; the other formats are numpy's. Every conversion and every fused
multiply-add here rounds once, to nearest and to even on a tie, as the hardware does. The trick for the fused operations
is *rounding to odd*: a sum that does not fit into fp64 is cut and its last bit set. Such a number is never taken for a
tie, so that rounding it again, to at most 51 bits, gives what one rounding of the exact sum gives (Boldo, Melquiond,
"When double rounding is odd", 2005).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

CANONICAL_NAN = 0x7FFF  # of f16 and bf16
BELOW_F32 = np.int64(2**29 - 1)  # the bits of an fp64 mantissa that fp32 does not have
TIE_F32 = np.int64(2**28)
SMALLEST_NORMAL_F32 = 2.0**-126


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(value).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(CANONICAL_NAN), rounded)


def f32_to_f16(value: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(value), np.uint16(CANONICAL_NAN), value.astype(np.float16).view(np.uint16)).view(
        np.float16
    )


def flush(value: np.ndarray) -> np.ndarray:
    """fp32 with subnormal numbers replaced by zeros of their sign (``.ftz``)."""
    return np.where(np.abs(value) < np.float32(SMALLEST_NORMAL_F32), np.copysign(np.float32(0), value), value)


def f64_to_narrow(value: np.ndarray, kind: str) -> np.ndarray:
    """fp64, exact or rounded to odd, to "f32", "f16" or "bf16" with one rounding."""
    if kind == "f32":
        return value.astype(np.float32)
    if kind == "f16":
        return f32_to_f16(_f64_to_odd_f32(value))
    return f32_to_bf16(_f64_to_odd_f32(value))


def _f64_to_odd_f32(value: np.ndarray) -> np.ndarray:
    near = value.astype(np.float32)
    bits = near.view(np.int32).copy()
    away = near.astype(np.float64)
    inexact = (away != value) & np.isfinite(near)
    bits[inexact & (np.abs(away) > np.abs(value))] -= 1  # cut, towards zero
    bits[inexact] |= 1
    overflown = np.isinf(near) & np.isfinite(value)
    return np.where(overflown, np.copysign(np.finfo(np.float32).max, value), bits.view(np.float32)).astype(np.float32)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a + b`` in fp64, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # exact (Knuth's two-sum)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.where(inexact, bits + step, bits).view(np.float64)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` of fp32 with one rounding."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: 48 bits
    addend = c.astype(np.float64)
    total = product + addend
    out = total.astype(np.float32)
    # A second rounding can only do harm where the first one gave a tie, or where fp32 has fewer than 24 bits.
    harm = (total.view(np.int64) & BELOW_F32) == TIE_F32
    harm |= (np.abs(total) < SMALLEST_NORMAL_F32) & (total != 0)
    if harm.any():
        product, addend = np.broadcast_to(product, out.shape)[harm], np.broadcast_to(addend, out.shape)[harm]
        out[harm] = sum_to_odd(product, addend).astype(np.float32)
    return out


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` of fp64 with one rounding, in exact fractions, one number after the other: right and slow."""
    rough = a * b + c
    out = rough.copy()
    for i, (x, y, z) in enumerate(zip(*(v.reshape(-1) for v in np.broadcast_arrays(a, b, c)), strict=True)):
        if np.isfinite(x) and np.isfinite(y) and np.isfinite(z):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            if exact:  # zeros keep the sign that the rounded sum has
                try:
                    out.reshape(-1)[i] = exact.numerator / exact.denominator  # correctly rounded by Python
                except OverflowError:
                    out.reshape(-1)[i] = np.copysign(np.inf, float(exact > 0) - 0.5)
    return out


def fma_narrow(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """``a b + c`` of f16 or bf16, whose values come as fp32, with one rounding."""
    total = sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    return f64_to_narrow(total, kind)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The larger number; a NaN only where both are; +0 above -0."""
    out = np.fmax(a, b)
    return out if out.all() else np.where((a == 0) & (b == 0), a + b, out)


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smaller number; a NaN only where both are; -0 below +0."""
    out = np.fmin(a, b)
    return out if out.all() else np.where((a == 0) & (b == 0), -(-a - b), out)


def maximum_or_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As :func:`maximum`, and a NaN where either is one."""
    return np.where(np.isnan(a) | np.isnan(b), np.array(np.nan, a.dtype), maximum(a, b))


def minimum_or_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As :func:`minimum`, and a NaN where either is one."""
    return -maximum_or_nan(-a, -b)
