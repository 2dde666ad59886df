"""Which builds of the kernels the JIT can be asked for, and a choice of launches that covers them.

What a kernel is compiled for follows from the arguments of its launch: the types of pointers and numbers, values of 1,
divisibility by 16 of sizes and addresses, and the constants. The JIT names all of that in its key, so the launchers are
called with tensors of all kinds and the keys are collected, which takes no compiler. There are thousands of them; of
these a few are chosen in which every two facts that can occur together do occur together.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from ptx_machine.driver import Launch, Launcher, MachineDriver
from ptx_machine.machine import Options
from triton.backends.compiler import GPUTarget

from patchkernels.kernels import cross_entropy, patch_embedding, scaling
from patchkernels.kernels import targets as kernel_targets
from patchkernels.numerics import LossOptions

SLOTS = (1, 2, 3, 4, 8, 17)
LAYOUTS = ("dense", "padded", "shifted", "misaligned", "long", "repeated")
PASSES = ("loss", "gradient", "loss in place", "both in place", "slice gradient", "slice statistics")
CROSS_ENTROPY = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "vocab": (1, 100, 128, 129, 144, 500, 512, 1000, 1024, 1900, 2048, 50257, 128256),  # of every block size
    "slots": SLOTS,
    "passes": PASSES,
    "smoothing": (0.0, 0.1),
    "softcap": (None, 30.0),
    "layout": LAYOUTS,
    "targets": (torch.int64, torch.int32),
    "ignore_index": (-100, 2**40),
    "begin": (0, 1, 2),  # where in a larger tensor the targets, c and losses begin, as those of a chunk do
    "programs": ("many", "few"),  # that both passes run with: if there are few, each has more threads
}
PATCH_EMBEDDING = {
    "dtype": CROSS_ENTROPY["dtype"],
    "hidden": (1, 5, 16, 20, 32, 40, 64, 100, 128, 200, 256, 500, 4096),  # of every block size
    "slots": SLOTS,
    "vocab": (1, 9, 16),
    "padding_idx": (None, 0, 1, 3),
    "layout": LAYOUTS,
    "ids": (torch.int64, torch.int32),
    "begin": (0, 1),
    "total": (None, "of its dtype", "fp32"),  # to which the gradient is added
}


SCALING = {
    "dtype": CROSS_ENTROPY["dtype"],
    "result": CROSS_ENTROPY["dtype"],
    "elements": (1, 7, 16, 100, 5008),
    "in_place": (False, True),
    "begin": (0, 1),
}
TARGETS = {
    "slots": SLOTS,
    "rows": (1, 2, 16, 100),
    "weight": (None, "slot", "target"),
    "reduction": ("sum", "mean", "slot_mean"),
    "every_loss": (False, True),
    "targets": CROSS_ENTROPY["targets"],
    "ignore_index": CROSS_ENTROPY["ignore_index"],
    "begin": (0, 1, 2),
}


@dataclass(frozen=True)
class Build:
    """What the JIT compiles for: the kernel, and the facts about its arguments that are in the key."""

    kernel: str
    facts: frozenset[tuple[str, str]]  # by argument or option: a type, divisibility by 16, or the value of a constant

    def groups(self, size: int = 2) -> list[tuple]:
        """Every ``size`` facts, with the kernel's name."""
        return [(self.kernel, *group) for group in itertools.combinations(sorted(self.facts), size)]


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


def rows_of(count: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A matrix of the given layout.

    Its rows are dense, padded to 16 elements, the same from the second element on, on odd addresses at odd distances,
    further apart than 32 bits can say, or all in the same memory.
    """
    padded = -(-columns // 16) * 16
    stride = {
        "dense": columns, "padded": padded, "shifted": padded + 16, "misaligned": padded + 3, "long": 2**31 + 16,
        "repeated": 0,
    }[layout]  # fmt: skip
    count, first = (1 if layout == "long" else count), (1 if layout in ("shifted", "misaligned") else 0)
    storage = torch.empty(first + (count - 1) * stride + padded, dtype=dtype)
    return storage.as_strided((count, columns), (stride, 1), first)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, begin: int = 0) -> torch.Tensor:
    """Zeros from an element of a larger tensor on."""
    return torch.zeros(begin + math.prod(shape), dtype=dtype)[begin:].view(shape)


def launch_cross_entropy(
    dtype: torch.dtype, vocab: int, slots: int, passes: str, smoothing: float, softcap: float | None, layout: str,
    targets: torch.dtype, ignore_index: int, begin: int, programs: str,
) -> None:  # fmt: skip
    cache = cross_entropy.CACHE_BYTES if programs == "many" else 1
    with mock.patch.multiple(cross_entropy, CACHE_BYTES=cache):
        _launch_cross_entropy(dtype, vocab, slots, passes, smoothing, softcap, layout, targets, ignore_index, begin)


def _launch_cross_entropy(
    dtype: torch.dtype, vocab: int, slots: int, passes: str, smoothing: float, softcap: float | None, layout: str,
    targets: torch.dtype, ignore_index: int, begin: int,
) -> None:  # fmt: skip
    if "in place" in passes and layout == "repeated":
        layout = "dense"  # such rows cannot be overwritten
    logits = rows_of(2, vocab, dtype, layout)
    rows = len(logits)
    target, c = zeros(rows, slots, dtype=targets, begin=begin), zeros(rows, slots, begin=begin)
    losses, statistics = zeros(rows, slots, begin=begin), zeros(3, rows)
    options = LossOptions(ignore_index, smoothing, softcap, z_loss_weight=smoothing)
    if passes == "loss":
        cross_entropy.loss(logits, target, options)
    elif passes == "gradient":
        cross_entropy.logits_gradient(c, logits, target, statistics[:2], options)
    elif passes == "slice gradient":
        cross_entropy.slice_gradient_(logits, 0, 2 * vocab, target, c, statistics[:2], options)
    elif passes == "slice statistics":
        cross_entropy.slice_statistics_(logits, 0, target, statistics, losses, options, keep_logits=True)
    else:
        given = c if passes == "both in place" else None
        cross_entropy.loss_and_gradient_(logits, target, given, losses, options)


def launch_patch_embedding(
    dtype: torch.dtype, hidden: int, slots: int, vocab: int, padding_idx: int | None, layout: str, ids: torch.dtype,
    begin: int, total: str | None,
) -> None:  # fmt: skip
    """Forward, and a backward of so many tokens that whole blocks are summed."""
    numbers = zeros(patch_embedding.BLOCK_T, slots, dtype=ids, begin=begin)
    patch_embedding.forward(numbers, rows_of(vocab, hidden, dtype, layout), padding_idx)
    grad = rows_of(len(numbers), hidden, dtype, layout)
    if total is None:
        patch_embedding.backward(grad, numbers, vocab, padding_idx)
    else:
        given = zeros(vocab, hidden, dtype=torch.float32 if total == "fp32" else dtype)
        patch_embedding.add_gradient_(given, grad, numbers, padding_idx)


def launch_scaling(dtype: torch.dtype, result: torch.dtype, elements: int, in_place: bool, begin: int) -> None:
    values, scale = zeros(elements, dtype=dtype, begin=begin), zeros()
    if in_place:
        scaling.scale_(values, scale)
    else:
        scaling.scale_into(zeros(elements, dtype=result), values, scale)


def launch_targets(
    slots: int, rows: int, weight: str | None, reduction: str, every_loss: bool, targets: torch.dtype,
    ignore_index: int, begin: int,
) -> None:  # fmt: skip
    if weight == "target" and reduction == "slot_mean":
        weight = "slot"  # which it takes alone
    shape = {None: (), "slot": (slots,), "target": (rows, slots)}[weight]
    given = None if weight is None else zeros(*shape, begin=begin)
    target = zeros(rows, slots, dtype=targets, begin=begin)
    kernel_targets.coefficients(target, given, ignore_index, reduction, every_loss, torch.float32)
    kernel_targets.weighted_sum(zeros(rows, slots, begin=begin), zeros(rows, slots))


LAUNCHES = (
    (launch_cross_entropy, CROSS_ENTROPY), (launch_patch_embedding, PATCH_EMBEDDING), (launch_scaling, SCALING),
    (launch_targets, TARGETS),
)  # fmt: skip


@contextlib.contextmanager
def watched(compiles: Callable[[Build], bool]) -> Iterator[list[Build]]:
    """Collects what the JIT is asked for; only builds for which ``compiles`` holds are compiled and launched."""
    found: list[Build] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        build = _build(fn.jit_function, compile)
        found.append(build)
        return not compiles(build)

    outer, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, hook
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = outer


def _build(kernel: Any, request: dict[str, Any]) -> Build:
    facts = [(option, str(request[option])) for option in ("num_warps", "enable_fp_fusion")]
    attributes = request["configs"][0]
    for place, (name, kind) in enumerate(request["signature"].items()):
        if kind == "constexpr":
            facts.append((name, f"= {request['constants'][place,]}"))
        else:
            facts.append((name, kind + ("".join(f", {key} {value}" for key, value in attributes.get((place,), ())))))
    return Build(kernel.__name__, frozenset(facts))


@contextlib.contextmanager
def driver_for(target: GPUTarget | int) -> Iterator[CompilingDriver]:
    """A driver that compiles for this target and runs nothing."""
    outer, driver = triton.runtime.driver.active, CompilingDriver(target)
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver.set_active(outer)


def reachable(number: int, seed: int = 0) -> dict[Build, tuple[Callable[..., None], dict[str, Any]]]:
    """Builds that the launchers ask for, each with a launch that does so, from random values of all factors."""
    generator, launches = random.Random(seed), {}
    with driver_for(90), watched(lambda build: False) as found:
        for launch, factors in LAUNCHES:
            for _ in range(number):
                case = {factor: generator.choice(values) for factor, values in factors.items()}
                found.clear()
                launch(**case)
                launches.update((build, (launch, case)) for build in found if build not in launches)
    return launches


def covering(builds: Iterable[Build], strength: int = 2) -> list[Build]:
    """Some of the builds, in which every ``strength`` facts that occur together in some build occur together."""
    builds = list(builds)
    groups = [build.groups(strength) for build in builds]
    numbers = {group: n for n, group in enumerate(dict.fromkeys(itertools.chain.from_iterable(groups)))}
    holds = np.zeros((len(builds), len(numbers)), bool)
    for row, found in zip(holds, groups, strict=True):
        row[[numbers[group] for group in found]] = True
    missing, chosen = np.ones(len(numbers), bool), []
    while missing.any():
        best = int((holds & missing).sum(1).argmax())
        chosen.append(builds[best])
        missing &= ~holds[best]
    return chosen
