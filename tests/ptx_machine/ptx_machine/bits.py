"""Logic, shifts, fields of bits, comparisons and choices, as operations on numpy arrays (as in ``arithmetic.py``)."""

from __future__ import annotations

import functools

import numpy as np

from .operations import INTEGERS, NARROW, Function, Operation, size_of, uniform, widen
from .parse import Constant, Instruction


def make_logic(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[i.op]
    return uniform(function, kinds[0], len(i.operands) - 1) if not rest else None


def make_lop3(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    table = i.operands[4]
    if not isinstance(table, Constant) or rest:
        return None

    def apply(a: np.ndarray, b: np.ndarray, c: np.ndarray, _: np.ndarray) -> np.ndarray:
        terms = (
            (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) for n in range(8) if table.bits >> n & 1
        )
        return functools.reduce(np.bitwise_or, terms, np.zeros_like(a))

    return uniform(apply, "b32", 4)


def make_shift(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    (kind,) = kinds
    return Operation(_shift_left if i.op == "shl" else _shift_right, (kind, "u32"), kind) if not rest else None


def _shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    return np.where(by >= width, a.dtype.type(0), a << np.minimum(by, width - 1).astype(a.dtype))


def _shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    beyond = a >> a.dtype.type(width - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(by >= width, beyond, a >> np.minimum(by, width - 1).astype(a.dtype))


def make_funnel(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    """A shift of two registers, of which one half is kept."""
    if not rest <= {"l", "r", "wrap", "clamp"}:
        return None
    half = np.uint64(32)

    def apply(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        pair = low.astype(np.uint64) | (high.astype(np.uint64) << half)
        by = (by & np.uint32(31) if "wrap" in rest else np.minimum(by, 32)).astype(np.uint64)
        return ((pair << by) >> half if "l" in rest else pair >> by).astype(np.uint32)

    return uniform(apply, "u32", 3)


def make_field(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    """``bfe`` takes a field of bits out, ``bfi`` puts one in."""
    (kind,) = kinds
    if size_of(kind) != 4 or rest:
        return None

    def mask_of(length: np.ndarray) -> np.ndarray:
        return ((np.uint64(1) << np.minimum(length & 255, 32).astype(np.uint64)) - np.uint64(1)).astype(np.uint32)

    def extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        field = _shift_right(a.view(np.uint32), start & 255) & mask_of(length)
        if kind[0] != "s":
            return field
        last = np.minimum((start & 255) + (length & 255) - 1, 31)
        negative = ((a.view(np.uint32) >> last) & np.uint32(1)).astype(bool) & ((length & 255) > 0)
        return np.where(negative, field | ~mask_of(length), field).view(np.int32)

    def insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        mask = _shift_left(mask_of(length), start & 255)
        return (b & ~mask) | (_shift_left(a, start & 255) & mask)

    kinds = (kind,) * (len(i.operands) - 3) + ("u32", "u32")
    return Operation(extract if i.op == "bfe" else insert, kinds, kind)


def make_count(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    """``popc``, ``clz`` and ``brev``, by the bits of each number."""
    (kind,) = kinds

    def bits_of(x: np.ndarray) -> np.ndarray:
        return np.unpackbits(np.ascontiguousarray(x)[:, None].view(np.uint8), axis=1, bitorder="little")

    def reverse(x: np.ndarray) -> np.ndarray:
        return np.packbits(bits_of(x)[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]

    def leading_zeros(x: np.ndarray) -> np.ndarray:
        bits = bits_of(x)[:, ::-1]
        return np.where(x == 0, bits.shape[1], bits.argmax(1)).astype(np.uint32)

    if rest:
        return None
    if i.op == "brev":
        return uniform(reverse, kind, 1)
    count = leading_zeros if i.op == "clz" else lambda x: bits_of(x).sum(1).astype(np.uint32)
    return Operation(count, (kind,), "u32")


def make_permute(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    """Any four of the eight bytes of two registers."""
    if rest:
        return None

    def apply(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.zeros(1, np.uint32)
        for n in range(4):
            chosen = (selector >> np.uint32(4 * n)) & np.uint32(15)
            byte = (pair >> ((chosen & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint8)
            byte = np.where(chosen >= 8, (byte.view(np.int8) >> 7).view(np.uint8), byte)  # 8 and above: its sign
            out = out | (byte.astype(np.uint32) << np.uint32(8 * n))
        return out

    return uniform(apply, "b32", 3)


# Comparisons and choices.

COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def make_comparison(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    (kind,) = kinds
    combined = [COMBINATIONS[m] for m in rest if m in COMBINATIONS]
    names = [m for m in rest if m not in COMBINATIONS and m != "ftz"]
    if len(names) != 1 or len(i.operands) != 3 + len(combined) or not hasattr(i.operands[0], "name"):
        return None
    compare = COMPARISONS.get(names[0]) if kind in INTEGERS or kind == "pred" else _compare_floats(names[0], kind)
    if compare is None:
        return None
    if combined:
        return Operation(lambda a, b, p: combined[0](compare(a, b), p), (kind, kind, "pred"), "pred")
    return Operation(compare, (kind, kind), "pred")


def _compare_floats(name: str, kind: str) -> Function | None:
    if kind in NARROW:
        wide = _compare_floats(name, "f32")
        return wide and (lambda a, b: wide(widen(a, kind), widen(b, kind)))
    either_nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if name in ("nan", "num"):
        return either_nan if name == "nan" else lambda a, b: ~either_nan(a, b)
    if name.endswith("u") and name[:-1] in COMPARISONS:
        return lambda a, b: COMPARISONS[name[:-1]](a, b) | either_nan(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~either_nan(a, b)
    return COMPARISONS.get(name)  # false where either is a NaN, as in numpy


def make_choice(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    (kind,) = kinds
    return Operation(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind) if not rest else None


def make_copy_sign(i: Instruction, kinds: tuple[str, ...], rest: frozenset[str]) -> Operation | None:
    return uniform(lambda sign, size: np.copysign(size, sign), kinds[0], 2) if kinds[0] in ("f32", "f64") else None
