"""The arithmetic of the machine against exact arithmetic of rational numbers, and against Python's integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from ptx_machine import floats
from ptx_machine.decode import operation
from ptx_machine.operations import DTYPES
from ptx_machine.parse import Constant, Instruction, Register

RANDOM = np.random.default_rng(0)
TIES = {"f16": (3, 683), "bf16": (7, 37), "f32": (97, 172961), "f64": (3, (2**53 + 1) // 3)}  # half a unit too long
FORMATS = {  # digits, smallest exponent of a normal number, largest finite number
    "f16": (11, -14, 65504.0),
    "bf16": (8, -126, float.fromhex("0x1.fep127")),
    "f32": (24, -126, float.fromhex("0x1.fffffep127")),
    "f64": (53, -1022, float.fromhex("0x1.fffffffffffffp1023")),
}


def compute(opcode: str, *operands: np.ndarray, constant: int | None = None) -> np.ndarray:
    op, *modifiers = opcode.split(".")
    count = 1 + len(operands) + (constant is not None)
    registers = [Register(f"%r{n}") for n in range(count)]
    if constant is not None:
        registers[-1], operands = Constant(constant), (*operands, np.array([constant], np.uint32))
    with np.errstate(all="ignore"):
        return operation(Instruction(opcode, 1, "", op, tuple(modifiers), tuple(registers), None)).function(*operands)


def rounded(exact: Fraction, kind: str) -> float:
    """The nearest number of a format; of two equally near ones, the one whose last digit is even."""
    digits, smallest, largest = FORMATS[kind]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, smallest)
    while exponent > smallest and Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    unit = Fraction(2) ** (exponent - digits + 1)
    nearest = round(size / unit) * unit  # Python rounds a tie to even
    value = float("inf") if nearest > Fraction(largest) else float(nearest)
    return value if exact > 0 else -value


def numbers(kind: str, values: np.ndarray) -> np.ndarray:
    """fp64 values in a format, as the machine holds them."""
    with np.errstate(all="ignore"):
        return floats.f64_to_narrow(values, kind) if kind != "f64" else values


def values_of(kind: str, held: np.ndarray) -> list[float]:
    return (floats.bf16_to_f32(held) if kind == "bf16" else held).astype(np.float64).tolist()


def hard_cases(kind: str) -> list[np.ndarray]:
    """Three arrays whose fused products are ties, nearly ties, subnormal, cancelled, large, or anything."""
    digits, smallest, _ = FORMATS[kind]
    odd = 1 + 2.0 ** (1 - digits)
    half = 2.0**-digits
    tiny = 2.0 ** (smallest - digits + 1)
    x, y = TIES[kind]
    rows = [
        (x, y, 0.0), (x, y, tiny), (x, y, -tiny), (x, y, half), (x, y, -half), (x, -y, tiny), (x, -y, -half),
        (odd, odd, 0.0), (odd, -odd, 1.0), (1.0, half, 1.0), (1.0, half, odd), (1.0, -half / 2, 1.0),
        (odd, half, 1.0), (2 - half * 2, half, 1.0), (odd, half, odd), (half, half * odd, 1.0), (-half, half, odd),
        (tiny, 0.5, 0.0), (tiny, 0.5, tiny), (tiny, 1.5, tiny), (tiny, 0.75, -tiny), (tiny * odd, odd, 1.0),
        (2.0**10, 2.0**5, 1.0), (3.0, 1.0, -3.0), (0.0, 5.0, -0.0), (half * odd, odd, 1.0), (tiny, tiny, half),
        (tiny, tiny, 1.0), (-tiny, tiny, 1.0), (tiny, -tiny, odd), (tiny, tiny, tiny),
    ]  # fmt: skip
    columns = np.array(rows).T
    columns = np.concatenate([columns, columns * np.array([[-1.0], [1.0], [-1.0]])], 1)
    random = RANDOM.standard_normal((3, 3000)) * 2.0 ** RANDOM.integers(-8, 8, (3, 3000))
    close = random.copy()
    close[2] = -close[0] * close[1] * (1 + RANDOM.integers(-3, 4, 3000) * half)  # nearly cancelled
    small = random * np.array([[2.0 ** (smallest // 2)], [2.0 ** (smallest // 2)], [2.0 ** (smallest + 2)]])
    return list(np.concatenate([columns, random, close, small], 1))


@pytest.mark.parametrize("kind", FORMATS)
def test_fused_products_are_rounded_once(kind):
    a, b, c = (numbers(kind, column) for column in hard_cases(kind))
    found = values_of(kind, compute(f"fma.rn.{kind}", a, b, c))
    operands = zip(*(values_of(kind, x) for x in (a, b, c)))
    expected = [rounded(Fraction(x) * Fraction(y) + Fraction(z), kind) for x, y, z in operands]
    assert found == expected


def test_two_roundings_would_differ_on_the_hard_cases():
    a, b, c = (numbers("f32", column) for column in hard_cases("f32"))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != compute("fma.rn.f32", a, b, c)).any()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_sums_and_products(kind, op):
    a, b, _ = (numbers(kind, column) for column in hard_cases(kind))
    found = values_of(kind, compute(f"{op}.{kind}", a, b))
    function = {"add": Fraction.__add__, "sub": Fraction.__sub__, "mul": Fraction.__mul__}[op]
    pairs = zip(values_of(kind, a), values_of(kind, b))
    assert found == [rounded(function(Fraction(x), Fraction(y)), kind) for x, y in pairs]


@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_conversions_from_fp32(to):
    digits, smallest, largest = FORMATS[to]
    x = np.concatenate([RANDOM.standard_normal(5000) * 2.0 ** RANDOM.integers(smallest - digits, 14, 5000),
                        [1 + 2.0**-digits, 1 + 3 * 2.0**-digits, largest]]).astype(np.float32)  # fmt: skip
    assert values_of(to, compute(f"cvt.rn.{to}.f32", x)) == [rounded(Fraction(float(v)), to) for v in x]
    specials = np.array([np.inf, -np.inf, -0.0, np.nan], np.float32)
    held = np.array(values_of(to, compute(f"cvt.rn.{to}.f32", specials)))
    assert np.isnan(held[3]) and held[:3].tolist() == [np.inf, -np.inf, 0.0] and np.signbit(held[2])
    pair = compute(f"cvt.rn.{to}x2.f32", x, x[::-1])
    assert np.array_equal((pair >> np.uint32(16)).astype(np.uint16), compute(f"cvt.rn.{to}.f32", x).view(np.uint16))


def test_conversions_to_integers_saturate():
    x = np.array([1.5, 2.5, -1.5, 3e9, -3e9, np.nan, np.inf, 255.9], np.float32)
    low, high = -(2**31), 2**31 - 1
    assert compute("cvt.rzi.s32.f32", x).tolist() == [1, 2, -1, high, low, 0, high, 255]
    assert compute("cvt.rni.s32.f32", x).tolist()[:3] == [2, 2, -2]
    assert compute("cvt.rmi.s32.f32", x).tolist()[:3] == [1, 2, -2]
    assert compute("cvt.rpi.f32.f32", x).tolist()[:3] == [2.0, 3.0, -1.0]
    assert compute("cvt.rzi.u8.f32", x).tolist() == [1, 2, 0, 255, 0, 0, 255, 255]
    assert compute("cvt.s64.s32", np.array([-1], np.int32)).tolist() == [-1]
    assert compute("cvt.u16.u32", np.array([70000], np.uint32)).tolist() == [70000 % 65536]


def test_flushing_subnormal_numbers():
    tiny, one = np.array([1e-40, -1e-40], np.float32), np.array([1.0], np.float32)
    assert compute("add.f32", tiny, tiny).all()
    flushed = compute("add.ftz.f32", tiny, tiny)
    assert not flushed.any() and np.signbit(flushed).tolist() == [False, True]
    assert compute("fma.rn.ftz.f32", tiny, one, one).tolist() == [1.0, 1.0]


def test_extremes_of_zeros_and_nans():
    zero, nan = np.array([0.0, -0.0], np.float32), np.full(2, np.nan, np.float32)
    assert not np.signbit(compute("max.f32", zero, zero[::-1])).any()
    assert np.signbit(compute("min.f32", zero, zero[::-1])).all()
    assert compute("max.f32", nan, zero).tolist() == [0.0, 0.0]
    assert np.isnan(compute("max.NaN.f32", nan, zero)).all()
    a, b = np.array([-3.0, 2.0], np.float32), np.array([2.0, 5.0], np.float32)
    assert compute("min.xorsign.abs.f32", a, b).tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers(kind):
    dtype = DTYPES[kind]
    limits, width = np.iinfo(dtype), 8 * np.dtype(dtype).itemsize
    edges = [limits.min, limits.min + 1, -1 % 2**width - (2**width if kind[0] == "s" else 0), 0, 1, 2, 7, limits.max]
    values = np.array(edges + RANDOM.integers(limits.min, limits.max, 200, dtype, endpoint=True).tolist(), dtype)
    a, b = np.repeat(values, len(values)), np.tile(values, len(values))
    pairs = list(zip(a.tolist(), b.tolist()))

    def wrap(value: int) -> int:
        value %= 2**width
        return value - 2**width if kind[0] == "s" and value >= 2 ** (width - 1) else value

    assert compute(f"mul.lo.{kind}", a, b).tolist() == [wrap(x * y) for x, y in pairs]
    assert compute(f"mul.hi.{kind}", a, b).tolist() == [wrap((x * y) >> width) for x, y in pairs]
    if width < 64:
        assert compute(f"mul.wide.{kind}", a, b).tolist() == [x * y for x, y in pairs]
    a, b = a[b != 0], b[b != 0]
    pairs = list(zip(a.tolist(), b.tolist()))
    quotient = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
    assert compute(f"div.{kind}", a, b).tolist() == [wrap(q) for q in quotient]
    assert compute(f"rem.{kind}", a, b).tolist() == [x - q * y for (x, y), q in zip(pairs, quotient)]
    by = RANDOM.integers(0, 80, len(a)).astype(np.uint32)
    assert compute(f"shr.{kind}", a, by).tolist() == [x >> n for x, n in zip(a.tolist(), by.tolist())]
    left = compute(f"shl.b{width}", a.view(f"u{width // 8}"), by)
    assert left.tolist() == [(x << n) % 2**width for x, n in zip(a.tolist(), by.tolist())]


def test_bits_of_words():
    a, b, c = RANDOM.integers(0, 2**32, (3, 500), np.uint32)
    start, length = RANDOM.integers(0, 32, (2, 500)).astype(np.uint32)
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), start.tolist(), length.tolist()))
    assert compute("popc.b32", a).tolist() == [x.bit_count() for x, *_ in rows]
    assert compute("clz.b32", a >> start).tolist() == [32 - (x >> s).bit_length() for x, _, _, s, _ in rows]
    assert compute("brev.b32", a).tolist() == [int(f"{x:032b}"[::-1], 2) for x, *_ in rows]
    assert compute("bfe.u32", a, start, length).tolist() == [(x >> s) & (2**n - 1) for x, _, _, s, n in rows]
    masks = [((2**n - 1) << s) % 2**32 for *_, s, n in rows]
    inserted = [(y & ~m) | ((x << s) & m) for (x, y, _, s, _), m in zip(rows, masks)]
    assert compute("bfi.b32", a, b, start, length).tolist() == inserted
    assert compute("shf.l.wrap.b32", a, b, start).tolist() == [
        (((y << 32 | x) << s) >> 32) % 2**32 for x, y, _, s, _ in rows
    ]
    assert compute("shf.r.clamp.b32", a, b, start).tolist() == [((y << 32 | x) >> s) % 2**32 for x, y, _, s, _ in rows]
    assert compute("prmt.b32", a, b, np.array([0x7410], np.uint32)).tolist() == [
        (x & 0xFFFF) | (y & 0xFF) << 16 | (y >> 24) << 24 for x, y, *_ in rows
    ]
    majority = compute("lop3.b32", a, b, c, constant=0xE8)
    assert majority.tolist() == [(x & y) | (x & z) | (y & z) for x, y, z, *_ in rows]
    signed = compute("bfe.s32", np.array([0xF0], np.uint32).view(np.int32), np.uint32([4]), np.uint32([4]))
    assert signed.tolist() == [-1]


def test_carries_make_wide_products():
    a, b = RANDOM.integers(0, 2**32, (2, 300), np.uint32)
    low, carry = compute("mad.lo.cc.u32", a, b, b, np.zeros(1, bool))
    high, _ = compute("madc.hi.u32", a, b, a, carry)
    assert [(h << 32) + x for h, x in zip(high.tolist(), low.tolist())] == [
        (x * y + y + (x << 32)) % 2**64 for x, y in zip(a.tolist(), b.tolist())
    ]


def test_comparisons_with_nan():
    a = np.array([1.0, 2.0, np.nan], np.float32)
    b = np.array([2.0, 2.0, 1.0], np.float32)
    assert compute("setp.lt.f32", a, b).tolist() == [True, False, False]
    assert compute("setp.geu.f32", a, b).tolist() == [False, True, True]
    assert compute("setp.ne.f32", a, b).tolist() == [True, False, False]
    assert compute("setp.neu.f32", a, b).tolist() == [True, False, True]
    assert compute("setp.num.f32", a, b).tolist() == [True, True, False]


def test_packed_and_mixed_formats():
    x = RANDOM.standard_normal((3, 400)).astype(np.float32)
    single = compute("fma.rn.f32", *x)
    packed = [
        v.view(np.uint32).astype(np.uint64) | (v[::-1].view(np.uint32).astype(np.uint64) << np.uint64(32)) for v in x
    ]
    pairs = compute("fma.rn.f32x2", *packed)
    assert np.array_equal(pairs.astype(np.uint32).view(np.float32), single)
    assert np.array_equal((pairs >> np.uint64(32)).astype(np.uint32).view(np.float32), single[::-1])
    narrow = floats.f32_to_bf16(x[0])
    assert np.array_equal(compute("sub.rn.f32.bf16", narrow, x[1]), floats.bf16_to_f32(narrow) - x[1])
