"""From an instruction to the operation it stands for, for all that compute a value from values alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import arithmetic, bits, floats
from .operations import DTYPES, Function, Operation
from .parse import Instruction

Maker = Callable[[Instruction, tuple[str, ...], frozenset[str]], "Operation | None"]
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("add", "sub", "addc", "subc"), arithmetic.make_sum),
    "mul": arithmetic.make_mul,
    **dict.fromkeys(("mad", "madc"), arithmetic.make_mad),
    "fma": arithmetic.make_fma,
    **dict.fromkeys(("div", "rem"), arithmetic.make_div),
    **dict.fromkeys(("ex2", "lg2", "rcp", "tanh", "sqrt", "rsqrt", "sin", "cos"), arithmetic.make_special),
    **dict.fromkeys(("min", "max"), arithmetic.make_extreme),
    **dict.fromkeys(("neg", "abs"), arithmetic.make_sign),
    **dict.fromkeys(("and", "or", "xor", "not"), bits.make_logic),
    "lop3": bits.make_lop3,
    **dict.fromkeys(("shl", "shr"), bits.make_shift),
    "shf": bits.make_funnel,
    **dict.fromkeys(("bfe", "bfi"), bits.make_field),
    **dict.fromkeys(("popc", "clz", "brev"), bits.make_count),
    "prmt": bits.make_permute,
    "setp": bits.make_comparison,
    "selp": bits.make_choice,
    "copysign": bits.make_copy_sign,
    "cvt": arithmetic.make_conversion,
}


def operation(i: Instruction) -> Operation:
    """Raises NotImplementedError, with the text of the instruction, for what is not known."""
    kinds = tuple(m for m in i.modifiers if m in DTYPES)
    rest = frozenset(m for m in i.modifiers if m not in DTYPES)
    maker = MAKERS.get(i.op)
    try:
        made = maker(i, kinds, rest) if maker else None
    except ValueError:  # another number of types than any known form has
        made = None
    if made is None:
        raise NotImplementedError(i.where)
    if "ftz" in rest and "f32" in kinds:
        return Operation(_flushed(made), made.kinds, made.result)
    return made


def _flushed(made: Operation) -> Function:
    def function(*operands: np.ndarray) -> np.ndarray:
        read = (floats.flush(x) if kind == "f32" else x for x, kind in zip(operands, made.kinds, strict=True))
        out = made.function(*read)
        return floats.flush(out) if made.result == "f32" else out

    return function
