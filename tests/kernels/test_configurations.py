"""Every kernel in the configurations that its launchers choose, compiled as the JIT compiles them: how much may spill.

What a kernel is compiled for follows from its arguments: types, values of 1, divisibility by 16 of sizes and addresses.
So the launchers themselves are called, with tensors of all kinds, and a driver that compiles and does not run. Of the
values of all factors every pair occurs together somewhere.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import triton_on_cpu

if not triton_on_cpu.ARCHITECTURE:
    pytest.skip("kernels are compiled only with PTX_MACHINE set", allow_module_level=True)

import triton
from ptx_machine.driver import SHARED_LIMITS, Launch, Launcher, MachineDriver
from ptx_machine.machine import Options

from patchkernels.kernels import cross_entropy, patch_embedding
from patchkernels.numerics import LossOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "padded", "misaligned", "long")
PASSES = ("loss", "gradient", "both in place", "slice gradient", "slice statistics")
# Bytes of stack a thread. Some configurations of cross entropy need up to 16: in fp32 with many options or unaligned
# rows. The default ones need none, which tests/kernels/test_ahead_of_time.py holds.
MOST_SPILLED = 16
SMOOTHING, SOFTCAP = {"label_smoothing": 0.1}, {"softcap": 30.0}
OPTIONS = {
    "plain": {},
    "smoothing": SMOOTHING,
    "softcap": SOFTCAP,
    "all": {**SMOOTHING, **SOFTCAP, "z_loss_weight": 1e-4},
}
CROSS_ENTROPY = {
    "dtype": DTYPES,
    "vocab": (1, 129, 500, 1000, 1024, 50257, 128256),
    "slots": (1, 2, 3, 4, 8, 17),
    "build": tuple(itertools.product(PASSES, OPTIONS)),
    "layout": LAYOUTS,
    "targets": (torch.int64, torch.int32),
    "ignore_index": (-100, 2**40),
}
PATCH_EMBEDDING = {
    "dtype": DTYPES,
    "hidden": (1, 16, 100, 768, 4096),
    "slots": (1, 2, 3, 4, 17),
    "vocab": (1, 9, 16),
    "padding_idx": (None, 0),
    "layout": LAYOUTS,
    "ids": (torch.int64, torch.int32),
}


class CompilingLauncher(Launcher):
    """Remembers what would be launched."""

    def __call__(self, x, y, z, stream, function, *arguments):
        triton.runtime.driver.active.compiled.append(self.describe((x, y, z), function))


class CompilingDriver(MachineDriver):
    """Compiles what is launched, and does not run it."""

    def __init__(self, arch: int):
        super().__init__(arch, Options())
        self.launcher_cls = CompilingLauncher
        self.compiled: list[Launch] = []

    def get_current_device(self) -> int:
        return -self.target.arch  # Triton keeps kernels by device, and those of other tests would run


@pytest.fixture(params=[80, 90, 100])
def driver(request):
    suite = triton.runtime.driver.active
    compiling = CompilingDriver(request.param)
    triton.runtime.driver.set_active(compiling)
    yield compiling
    triton.runtime.driver.set_active(suite)


def pairwise(factors: dict[str, tuple]) -> list[dict]:
    """Cases in which every two values of two factors occur together."""
    open_pairs = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(factors, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    cases = []
    while open_pairs:
        case = dict(min(open_pairs, key=sorted))
        for factor, values in factors.items():
            if factor not in case:
                gains = [
                    sum(frozenset([(factor, n), item]) in open_pairs for item in case.items())
                    for n in range(len(values))
                ]
                case[factor] = gains.index(max(gains))
        open_pairs -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append({factor: factors[factor][n] for factor, n in case.items()})
    return cases


def rows_of(count: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A matrix whose rows are dense, padded to 16 elements, on odd addresses, or further apart than 32 bits can say."""
    padded = -(-columns // 16) * 16
    stride = {"dense": columns, "padded": padded, "misaligned": padded + 3, "long": 2**31 + 16}[layout]
    count, first = (1 if layout == "long" else count), (1 if layout == "misaligned" else 0)
    storage = torch.empty(first + (count - 1) * stride + padded, dtype=dtype)
    return storage.as_strided((count, columns), (stride, 1), first)


def launch_cross_entropy(dtype, vocab, slots, build, layout, targets, ignore_index) -> None:
    passes, options = build
    logits = rows_of(2, vocab, dtype, layout)
    rows = len(logits)
    target, c = torch.zeros(rows, slots, dtype=targets), torch.zeros(rows, slots)
    chosen = LossOptions(ignore_index=ignore_index, **OPTIONS[options])
    if passes == "loss":
        cross_entropy.loss(logits, target, chosen)
    elif passes == "gradient":
        cross_entropy.logits_gradient(c, logits, target, torch.zeros(rows), chosen)
    elif passes == "both in place":
        cross_entropy.loss_and_gradient_(logits, target, c, torch.zeros(rows, slots), chosen)
    elif passes == "slice gradient":
        cross_entropy.slice_gradient_(logits, 0, 2 * vocab, target, c, torch.zeros(rows), chosen)
    else:
        statistics = torch.zeros(3, rows), torch.zeros(rows, slots)
        cross_entropy.slice_statistics_(logits, 0, target, *statistics, chosen, keep_logits=True)


def launch_patch_embedding(dtype, hidden, slots, vocab, padding_idx, layout, ids) -> None:
    """Forward, and a backward of so many tokens that whole blocks are summed."""
    numbers = torch.zeros(patch_embedding.BLOCK_T, slots, dtype=ids)
    patch_embedding.forward(numbers, rows_of(vocab, hidden, dtype, layout), padding_idx)
    patch_embedding.backward(rows_of(len(numbers), hidden, dtype, layout), numbers, vocab, padding_idx)


@pytest.mark.parametrize(
    ("launch", "factors", "most_spilled"),
    [(launch_cross_entropy, CROSS_ENTROPY, MOST_SPILLED), (launch_patch_embedding, PATCH_EMBEDDING, 0)],
    ids=["cross_entropy", "patch_embedding"],
)
def test_spills_are_none_or_few(driver, launch, factors, most_spilled):
    cases = pairwise(factors)
    spilled = {}
    for case in cases:
        driver.compiled.clear()
        launch(**case)
        assert driver.compiled
        for compiled in driver.compiled:
            assert compiled.resources.threads <= 1024
            assert compiled.resources.shared <= SHARED_LIMITS.get(driver.target.arch, 227 * 1024)
            if compiled.resources.spilled > most_spilled:
                spilled[f"{compiled.name}: {case}"] = compiled.resources.spilled
    assert spilled == {}, f"{len(spilled)} of {len(cases)} cases spill more than {most_spilled} bytes a thread"


@pytest.mark.parametrize("driver", [90], indirect=True)
def test_aligned_rows_move_in_16_byte_vectors(driver):
    launch_cross_entropy(torch.bfloat16, 128256, 4, ("both in place", "plain"), "dense", torch.int64, -100)
    launch_patch_embedding(torch.bfloat16, 4096, 4, 16, None, "dense", torch.int64)
    for compiled in driver.compiled:
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", compiled.ptx), compiled.name
        assert re.search(r"st\.global[.\w:]*\.v4\.b32", compiled.ptx), compiled.name
    assert len({compiled.name for compiled in driver.compiled}) == 4


def test_pairs_are_complete():
    factors = {"a": (1, 2, 3), "b": (True, False), "c": ("x", "y", "z", "w")}
    cases = pairwise(factors)
    for a, b in itertools.combinations(factors, 2):
        assert {(case[a], case[b]) for case in cases} == set(itertools.product(factors[a], factors[b]))
    assert len(cases) < 3 * 2 * 4
