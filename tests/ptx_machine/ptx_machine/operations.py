"""The types of PTX in numpy, and what describes an operation on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import floats

DTYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f32x2": np.uint64, "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
INTEGERS = {k for k in DTYPES if k[0] in "sub" and k[1:].isdigit()}
NARROW = ("f16", "bf16")
Function = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Operation:
    """``result = function(*operands)``, the operands read as ``kinds``.

    With ``carry`` the function also takes the carry flag last, and returns a pair: the result and the new flag.
    """

    function: Function
    kinds: tuple[str, ...]
    result: str
    carry: bool = False


def size_of(kind: str) -> int:
    return np.dtype(DTYPES[kind]).itemsize


def uniform(function: Function, kind: str, count: int) -> Operation:
    """An operation whose operands and result have one type."""
    return Operation(function, (kind,) * count, kind)


def widen(value: np.ndarray, kind: str) -> np.ndarray:
    """f16 or bf16 as fp32."""
    return floats.bf16_to_f32(value) if kind == "bf16" else value.view(np.float16).astype(np.float32)
