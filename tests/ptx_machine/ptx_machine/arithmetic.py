"""Sums, products, quotients, extremes and conversions of numbers, as operations on numpy arrays.

Each ``make_`` function gets an instruction, the types among its modifiers and its other modifiers. It returns None for
a form that is not known. Registers have no type in PTX, so the same bits may be an integer here and a float there.
"""

from __future__ import annotations

import functools

import numpy as np

from . import floats
from .operations import DTYPES, INTEGERS, NARROW, Function, Operation, size_of, uniform, widen
from .parse import Instruction

ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}

# Functions that are applied to fp32 or wider, for operands in narrow or packed formats.


def _narrowed(function: Function, kind: str, fused: bool) -> Function:
    """A function of f16 or bf16, from the function of fp32.

    Sums, differences and products of such numbers that are computed in fp32 and rounded again are right, because fp32
    has more than twice their digits. Fused operations need more care.
    """

    def apply(*operands: np.ndarray) -> np.ndarray:
        wide = [widen(x, kind) for x in operands]
        if fused:
            return floats.fma_narrow(*wide, kind)
        out = function(*wide)
        return floats.f32_to_bf16(out) if kind == "bf16" else floats.f32_to_f16(out)

    return apply


def _packed(function: Function, half: type, whole: type) -> Function:
    """A function of two numbers in one register, from one of single numbers."""
    shift = whole(8 * np.dtype(half).itemsize)

    def apply(*operands: np.ndarray) -> np.ndarray:
        low = function(*(x.astype(half) for x in operands))
        high = function(*((x >> shift).astype(half) for x in operands))
        return low.view(half).astype(whole) | (high.view(half).astype(whole) << shift)

    return apply


def _with_formats(function: Function, kinds: tuple[str, ...], count: int, fused: bool = False) -> Operation | None:
    """The operation in any floating format, from its function in fp32."""
    (kind, *more) = kinds
    if more:  # the first operands are narrow, the last one and the result fp32
        if kind != "f32" or len(more) > 1 or more[0] not in NARROW:
            return None
        small = more[0]
        mixed = lambda *x: function(*(widen(v, small) for v in x[:-1]), x[-1])  # noqa: E731
        return Operation(mixed, (small,) * (count - 1) + ("f32",), "f32")
    if kind == "f32":
        return uniform(function, kind, count)
    if kind == "f64":
        return uniform(floats.fma_f64 if fused else function, kind, count)
    if kind in NARROW:
        return uniform(_narrowed(function, kind, fused), kind, count)
    if kind == "f32x2":
        return uniform(
            _packed(lambda *x: function(*(v.view(np.float32) for v in x)), np.uint32, np.uint64), kind, count
        )
    if kind in ("f16x2", "bf16x2"):
        return uniform(_packed(_narrowed(function, kind[:-2], fused), np.uint16, np.uint32), kind, count)
    return None


# Sums, products and quotients.


def make_sum(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    function = {"add": np.add, "sub": np.subtract, "addc": np.add, "subc": np.subtract}[i.op]
    if kinds and kinds[0] in INTEGERS:
        if "cc" in rest or i.op[-1] == "c":
            return make_carry(i, kinds[0])
        return uniform(function, kinds[0], 2) if not rest else None
    return _with_formats(function, kinds, 2) if rest <= {"rn", "ftz"} else None


def make_carry(i: Instruction, kind: str) -> Operation | None:
    """32-bit sums that leave or take the carry flag: parts of wider integers."""
    if size_of(kind) != 4:
        return None
    takes, product = i.op in ("addc", "subc", "madc"), i.op in ("mad", "madc")
    shift = np.uint64(32 if "hi" in i.modifiers else 0)

    def apply(*operands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        *values, flag = (x.view(np.uint32).astype(np.uint64) if x.dtype != np.bool_ else x for x in operands)
        flag = flag.astype(np.uint64) if takes else np.uint64(0)
        if i.op in ("sub", "subc"):
            total = values[0] - values[1] - flag
        else:
            first = ((values[0] * values[1]) >> shift) & np.uint64(2**32 - 1) if product else values[0]
            total = first + values[-1] + flag
        return total.astype(np.uint32), (total >> np.uint64(32)) != 0

    kind = "u32" if not product or kind == "u32" else ""  # a high part of signed factors is never needed
    return Operation(apply, (kind,) * (3 if product else 2), "u32", carry=True) if kind else None


def make_mul(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    if not kinds or kinds[0] not in INTEGERS:
        return _with_formats(np.multiply, kinds, 2) if rest <= {"rn", "ftz"} else None
    return _product(kinds[0], rest, None)


def make_mad(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    if kinds[0] not in INTEGERS:
        return None
    if i.op == "madc" or "cc" in rest:
        return make_carry(i, kinds[0])
    return _product(kinds[0], rest, np.add)


def _product(kind: str, rest: frozenset[str], then: Function | None) -> Operation | None:
    """``mul`` (``then`` None) and ``mad``: the low half of a product, its high half, or all of it."""
    result = kind
    if rest == {"lo"}:
        function = np.multiply
    elif rest == {"hi"}:
        function = _high_half
    elif rest == {"wide"} and size_of(kind) <= 4:
        result = f"{kind[0]}{16 * size_of(kind)}"
        wide = DTYPES[result]
        function = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    else:
        return None
    if then is None:
        return Operation(function, (kind, kind), result)
    return Operation(lambda a, b, c: then(function(a, b), c), (kind, kind, result), result)


def _high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = a.dtype.itemsize
    if size < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    x, y, mask, half = a.view(np.uint64), b.view(np.uint64), np.uint64(2**32 - 1), np.uint64(32)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    low = (middle & mask) + x0 * y1
    high = x1 * y1 + (middle >> half) + (low >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def make_fma(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    return _with_formats(floats.fma_f32, kinds, 3, fused=True) if rest <= {"rn", "ftz"} else None


def make_div(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    (kind,) = kinds
    if kind in INTEGERS and not rest:
        return uniform(functools.partial(_divide, remainder=i.op == "rem"), kind, 2)
    if i.op == "div" and kind in ("f32", "f64") and rest <= {"rn", "full", "approx", "ftz"}:
        return uniform(np.divide, kind, 2)
    return None


def _divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """The quotient towards zero; by 0, which PTX leaves open, all bits are ones."""
    quotient = np.floor_divide(a, b)
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))
    quotient = np.where(b == 0, ~np.zeros(1, a.dtype), quotient)
    return a - quotient * b if remainder else quotient


def make_special(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    """Functions that the hardware approximates; here they are computed in fp64 and rounded."""
    function = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "tanh": np.tanh, "sqrt": np.sqrt, "sin": np.sin,
        "cos": np.cos, "rsqrt": lambda x: 1 / np.sqrt(x),
    }[i.op]  # fmt: skip
    if kinds == ("f64",) and rest <= {"rn"}:
        return uniform(function, "f64", 1)
    if kinds != ("f32",) or not rest <= {"approx", "rn", "ftz"}:
        return None
    return uniform(lambda x: function(x.astype(np.float64)).astype(np.float32), "f32", 1)


def make_extreme(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    (kind,), count = kinds, len(i.operands) - 1
    if kind in INTEGERS:
        return uniform(np.maximum if i.op == "max" else np.minimum, kind, 2)
    if not rest <= {"NaN", "ftz", "xorsign", "abs"}:
        return None
    name = ("maximum" if i.op == "max" else "minimum") + ("_or_nan" if "NaN" in rest else "")
    two: Function = getattr(floats, name)
    if "abs" in rest:
        plain, signed = two, "xorsign" in rest

        def two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            out = plain(np.abs(a), np.abs(b))
            return np.where(np.signbit(a) != np.signbit(b), -out, out) if signed else out

    return _with_formats(lambda *x: functools.reduce(two, x), kinds, count)


def make_sign(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    (kind,) = kinds
    if kind in NARROW:
        bit = np.uint16(0x8000)
        change = (lambda x: x ^ bit) if i.op == "neg" else (lambda x: x & ~bit)
        return Operation(change, ("b16",), "b16")
    if kind in ("f16x2", "bf16x2"):
        bits = np.uint32(0x80008000)
        return Operation((lambda x: x ^ bits) if i.op == "neg" else (lambda x: x & ~bits), ("b32",), "b32")
    return uniform(np.abs if i.op == "abs" else np.negative, kind, 1) if rest <= {"ftz"} else None


# Conversions.


def make_conversion(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    to, source = kinds
    how = next((m for m in rest if m in ("rn", "rz", *ROUNDING)), "")
    if rest - {how, "ftz"}:
        return None
    if to in ("f16x2", "bf16x2"):
        return make_packing(to[:-2], source, how)
    if source in INTEGERS and to in INTEGERS:
        return Operation(lambda x: x.astype(DTYPES[to]), (source,), to)
    if source in INTEGERS:
        wide = lambda x: floats.f64_to_narrow(x.astype(np.float64), to)  # noqa: E731
        simple = lambda x: x.astype(DTYPES[to])  # noqa: E731
        if how != "rn" or (to in NARROW and size_of(source) > 4):
            return None
        return Operation(wide if to in NARROW else simple, (source,), to)
    wider = functools.partial(widen, kind=source) if source in NARROW else lambda x: x
    if to in INTEGERS:
        return Operation(lambda x: _to_integer(ROUNDING[how](wider(x)), to), (source,), to) if how in ROUNDING else None
    if how in ROUNDING and to == source:
        return uniform(ROUNDING[how], to, 1) if to not in NARROW else None
    if how == "rz" and (to, source) != ("bf16", "f32"):
        return None
    return Operation(lambda x: _to_floating(wider(x), to, how), (source,), to)


def make_packing(to: str, source: str, how: str) -> Operation | None:
    """Two numbers of fp32 in one register: the first operand becomes the upper half."""
    if source != "f32" or how not in ("rn", "rz") or (how, to) == ("rz", "f16"):
        return None
    half = lambda x: _to_floating(x, to, how).view(np.uint16).astype(np.uint32)  # noqa: E731
    return Operation(lambda high, low: (half(high) << np.uint32(16)) | half(low), ("f32", "f32"), to + "x2")


def _to_integer(value: np.ndarray, to: str) -> np.ndarray:
    """Saturated; a NaN becomes 0."""
    limits = np.iinfo(DTYPES[to])
    wide = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = (wide > float(limits.min)) & (wide < float(limits.max))
    out = np.where(inside, wide, 0).astype(DTYPES[to])
    return np.where(inside, out, np.where(wide > 0, limits.max, np.where(wide < 0, limits.min, 0)).astype(DTYPES[to]))


def _to_floating(value: np.ndarray, to: str, how: str) -> np.ndarray:
    if to not in NARROW:
        return value.astype(DTYPES[to])
    if how == "rz":
        return (value.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return floats.f64_to_narrow(value.astype(np.float64), to) if value.dtype != np.float32 else (
        floats.f32_to_bf16(value) if to == "bf16" else floats.f32_to_f16(value)
    )  # fmt: skip
