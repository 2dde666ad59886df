"""Compiled kernels on the machine against results that are known, on every architecture and in every order of warps."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
import triton_on_cpu

if not triton_on_cpu.ARCHITECTURE:
    pytest.skip("kernels are compiled only with PTX_MACHINE set", allow_module_level=True)

import ptx_machine
import triton
import triton.language as tl
from ptx_machine.driver import TALLIES, Tally
from ptx_machine.machine import ORDERS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[80, 90, 100])
def machine(request):
    suite = triton.runtime.driver.active
    yield ptx_machine.install(request.param)
    triton.runtime.driver.set_active(suite)


@pytest.fixture
def in_every_order(machine):
    """Runs a function in every order; returns what it returns, which must be the same bits."""

    def run(function):
        results = []
        for order in ORDERS:
            machine.options = ptx_machine.Options(order=order, seed=7)
            results.append(function())
        assert all(torch.equal(result, results[0]) for result in results)
        return results[0]

    return run


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def increment_kernel(x, out, n, UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes all but the last element; with UPDATE it reads what it overwrites."""
    i = tl.arange(0, BLOCK)
    added = tl.load(out + i, mask=i < n) if UPDATE else 1
    tl.store(tl.where(i < n, out, x) + i, tl.load(x + i, mask=i < n) + added, mask=i < n - 1)


@triton.jit
def softmax_kernel(x, out, n, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * stride
    z = tl.load(x + row + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(z - tl.max(z, 0))
    tl.store(out + row + i, (e / tl.sum(e, 0)).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def branch_and_loop_kernel(x, out, n, BLOCK: tl.constexpr):
    """Programs take different branches and go through a loop a different number of times."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + program * BLOCK + i)
    total = value * 0
    if tl.sum(value, 0) > 0:
        for j in range(n + program):
            total += value // 3 + j
    else:
        total = value % 7
    tl.store(out + program * BLOCK + i, total)


@triton.jit
def running_sum_kernel(x, out, n, BLOCK: tl.constexpr):
    """A thread holds BLOCK / 32 sums for the length of a loop."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(n):
        total += tl.load(x + j * BLOCK + i)
    tl.store(out + i, total)


@triton.jit
def transpose_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(x + r[:, None] * COLUMNS + c[None, :])
    tl.store(out + c[:, None] * ROWS + r[None, :], tl.trans(block))


@triton.jit
def scan_kernel(x, sums, ordered, reversed_, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(sums + i, tl.cumsum(value, 0))
    tl.store(ordered + i, tl.sort(value))
    tl.store(reversed_ + i, tl.flip(value, 0))


@triton.jit
def histogram_kernel(x, counts, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counted = tl.histogram(tl.load(x + i, mask=i < n, other=BINS - 1), BINS)
    tl.atomic_add(counts + tl.arange(0, BINS), counted)


@triton.jit
def functions_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, tl.sin(value))
    tl.store(out + n + i, tl.log2(tl.abs(value)) + tl.sqrt(tl.abs(value)))
    tl.store(out + 2 * n + i, tl.math.rsqrt(tl.abs(value)) + tl.floor(value) + tl.ceil(value))
    tl.store(out + 3 * n + i, tl.math.erf(value))
    tl.store(out + 4 * n + i, value.to(tl.int32).to(tl.float32) + value.to(tl.int64).to(tl.float32))
    tl.store(out + 5 * n + i, tl.math.div_rn(value, 3.0) + tl.math.fma(value, value, 1.0))


@triton.jit
def doubles_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) * tl.load(y + i) + 1.0)


@triton.jit
def atomics_kernel(values, integers, floats, halves, taken, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + i)
    tl.atomic_add(integers + i % 5, value)
    tl.atomic_max(integers + 8 + i % 5, value)
    tl.atomic_min(integers + 16 + i % 5, value)
    tl.atomic_xor(integers + 24 + i % 5, value)
    tl.atomic_add(floats + i % 5, value.to(tl.float32))
    tl.atomic_add(halves + i % 64, (value % 4).to(halves.dtype.element_ty))
    tl.atomic_cas(taken, 0, tl.program_id(0) + 1)


@pytest.mark.parametrize("option", [{"launch_cooperative_grid": True}, {"num_ctas": 2}])
def test_launches_that_are_not_modelled_are_refused(option):
    suite = triton.runtime.driver.active
    ptx_machine.install(90)
    x = torch.zeros(256)
    with pytest.raises(NotImplementedError, match=r"add_kernel: .* not supported"):
        add_kernel[(1,)](x, x, x, 256, BLOCK=256, **option)
    triton.runtime.driver.set_active(suite)


def test_the_interpreter_and_the_machine_exclude_each_other(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        ptx_machine.install(90)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 100, 1024, 1040])
def test_sum_and_what_it_moves(machine, n, dtype):
    x, y, out = torch.randn(n).to(dtype), torch.randn(n).to(dtype), torch.empty(n, dtype=dtype)
    with machine.record() as launches:
        add_kernel[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)
    (launch,) = launches
    counters = launch.counters
    assert counters.unique_read == 2 * n * x.element_size() and counters.unique_written == n * x.element_size()
    assert counters.padding_read == counters.padding_written == 0
    assert launch.resources.registers > 0 and launch.resources.spilled == 0 and 0 < launch.resources.occupancy <= 1


@pytest.mark.parametrize(("dtype", "poison"), [(torch.float16, torch.nan), (torch.int32, 2**31 - 1)])
def test_an_element_that_a_kernel_does_not_write_is_poisoned(machine, dtype, poison):
    x, storage = torch.ones(20, dtype=dtype), torch.zeros(30, dtype=dtype)
    out, unwritten = storage[2:22], torch.tensor([poison], dtype=dtype)

    def run(update=False, **options):
        machine.options = ptx_machine.Options(**options)
        storage.zero_()
        increment_kernel[(1,)](x, out, 20, UPDATE=update, BLOCK=32, num_warps=1)
        assert (out[:19] == 1 + (not update)).all() and (x == 1).all()
        assert not storage[:2].any() and not storage[22:].any()  # memory of other tensors stays
        return out[19:]

    assert not run().any()
    assert torch.equal(run(poison=True), unwritten) or run(poison=True).isnan()
    assert not run(poison=True, kept=frozenset({"out"})).any()
    assert not run(update=True, poison=True).any()  # what a kernel reads keeps its values


def test_a_tensor_that_is_overwritten_in_place_is_not_poisoned(machine):
    x = torch.arange(100.0)
    machine.options = ptx_machine.Options(poison=True)
    add_kernel[(1,)](x, x, x, 100, BLOCK=128)
    assert torch.equal(x, 2 * torch.arange(100.0))


def test_values_that_do_not_fit_in_registers(machine):
    x, out = torch.ones(3, 4096), torch.empty(4096)
    with machine.record() as launches:
        running_sum_kernel[(1,)](x, out, 3, BLOCK=4096, num_warps=1, maxnreg=64)
        running_sum_kernel[(1,)](x, out, 3, BLOCK=4096, num_warps=8, maxnreg=64)
    narrow, wide = (launch.resources for launch in launches)
    assert narrow.registers <= 64 and narrow.spilled > 200 and narrow.spills_in_loop
    assert wide.spilled == 0 and not wide.spills_in_loop
    assert (out == 3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "warps"), [(17, 1), (1000, 4), (1024, 8)])
def test_softmax(in_every_order, n, warps, dtype):
    x = torch.randn(5, n).to(dtype)

    def run():
        out = torch.empty_like(x)
        softmax_kernel[(5,)](x, out, n, n, BLOCK=1024, num_warps=warps)
        return out

    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(in_every_order(run).double(), x.double().softmax(-1), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_branches_and_loops(in_every_order, n):
    x = torch.randint(-1000, 1000, (6, 128))
    x[2] = -x[2].abs()

    def run():
        out = torch.empty_like(x)
        branch_and_loop_kernel[(6,)](x, out, n, BLOCK=128)
        return out

    times = n + torch.arange(6)[:, None]
    looped = times * torch.div(x, 3, rounding_mode="trunc") + times * (times - 1) // 2
    expected = torch.where(x.sum(1, keepdim=True) > 0, looped, torch.fmod(x, 7))
    assert torch.equal(in_every_order(run), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.int64])
def test_transpose(in_every_order, dtype):
    x = torch.randint(-100, 100, (64, 32)).to(dtype)

    def run():
        out = torch.empty(32, 64, dtype=dtype)
        transpose_kernel[(1,)](x, out, ROWS=64, COLUMNS=32)
        return out

    assert torch.equal(in_every_order(run), x.T)


def test_scan_sort_and_flip(in_every_order):
    x = torch.randint(-50, 50, (256,)).float()

    def run():
        out = torch.empty(3, 256)
        scan_kernel[(1,)](x, *out, BLOCK=256)
        return out

    assert torch.equal(in_every_order(run), torch.stack([x.cumsum(0), x.sort().values, x.flip(0)]))


def test_histogram(in_every_order):
    x = torch.randint(0, 16, (1000,), dtype=torch.int32)

    def run():
        counts = torch.zeros(16, dtype=torch.int32)
        histogram_kernel[(4,)](x, counts, 1000, BLOCK=256, BINS=16)
        return counts

    expected = torch.bincount(x, minlength=16)
    expected[15] += 24  # the places past the end
    assert torch.equal(in_every_order(run).long(), expected)


def test_functions_of_fp32(machine):
    x = torch.cat([torch.randn(120) * 10, torch.tensor([1e6, -3e7, 0.0, 1.0, -1.0, 0.5, 1e-30, 2.0])])
    out = torch.empty(6, 128)
    functions_kernel[(1,)](x, out, 128, BLOCK=128)
    d = x.double()
    expected = [
        d.sin(), d.abs().log2() + d.abs().sqrt(), d.abs().rsqrt() + d.floor() + d.ceil(), d.erf(), 2 * d.trunc(),
        (x / 3).double() + (d * d + 1),
    ]  # fmt: skip
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_fp64(machine):
    x, y = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    out = torch.empty(64, dtype=torch.float64)
    doubles_kernel[(1,)](x, y, out, BLOCK=64)
    exact = [float(Fraction(a) * Fraction(b) + 1) for a, b in zip(x.tolist(), y.tolist())]  # one rounding
    assert out.tolist() == exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_atomics(machine, dtype):
    values = torch.randint(-40, 40, (256,), dtype=torch.int32)
    integers, floats, halves = torch.zeros(32, dtype=torch.int32), torch.zeros(5), torch.zeros(64, dtype=dtype)
    taken = torch.zeros(1, dtype=torch.int32)
    atomics_kernel[(2,)](values, integers, floats, halves, taken, BLOCK=128)
    groups = [values[torch.arange(256) % 5 == n] for n in range(5)]
    assert integers[:5].tolist() == [int(g.sum()) for g in groups]
    assert integers[8:13].tolist() == [max(0, int(g.max())) for g in groups]
    assert integers[16:21].tolist() == [min(0, int(g.min())) for g in groups]
    assert floats.tolist() == [float(g.sum()) for g in groups]
    assert torch.equal(halves, torch.fmod(values, 4).reshape(4, 64).sum(0).to(dtype))
    assert taken.item() == 1


def test_the_tally_of_what_was_executed(machine):
    before = dataclasses.replace(TALLIES[machine.target.arch])
    x, out = torch.randn(32), torch.empty(32)
    for _ in range(2):
        add_kernel[(1,)](x, x, out, 32, BLOCK=32)
    after = TALLIES[machine.target.arch]
    assert after.launches - before.launches == 2
    assert after.executed <= after.compiled and {"add.f32", "ret"} <= after.forms
    both = Tally(1, {"a"}, {"a"}, {"ret"})
    both.add(Tally(2, {"a"}, {"a", "b"}, {"add.f32"}))
    assert both == Tally(3, {"a"}, {"a", "b"}, {"ret", "add.f32"})
