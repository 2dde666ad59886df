"""Every kernel in the builds that the operators ask for: each fits on a GPU and can be executed on the machine.

The choice of builds and what they cover is explained in ``kernel_builds``.
"""

from __future__ import annotations

import itertools
import os
import random
import re

import pytest
import torch
import triton_on_cpu

if not triton_on_cpu.ARCHITECTURE:
    pytest.skip("kernels are compiled only with PTX_MACHINE set", allow_module_level=True)

import triton
from kernel_builds import (
    SLOTS,
    Build,
    covering,
    driver_for,
    launch_cross_entropy,
    launch_patch_embedding,
    reachable,
    watched,
)
from ptx_machine.driver import SHARED_LIMITS

from patchkernels import linear_patch_cross_entropy, patch_cross_entropy, patch_embedding

DRAWS = 3000  # launches of each operator from which the builds are chosen
PUBLIC_CALLS = 1000
STRENGTH = int(os.environ.get("BUILDS_STRENGTH", "2"))  # how many facts at a time are covered; 3 takes hours
# Bytes of stack a thread, outside of innermost loops. What cross entropy keeps while it walks through a row, for its
# targets and for the next row, may be written to the stack before and read after, where ptxas would rather have room
# for another warp. Triton 3.9 writes some of eight rows on odd addresses, further apart than 32 bits can say, to the
# stack on sm_100. So may be what the backward of patch embedding keeps for an id, if the table has one row.
MOST_SPILLED = {"patch_cross_entropy_kernel": 32, "patch_embedding_backward_kernel": 16}
if triton.__version__.startswith("3.9."):
    MOST_SPILLED |= {"patch_embedding_kernel": 48, "patch_embedding_backward_kernel": 24}
KERNELS = (
    "patch_cross_entropy_kernel",
    "slice_statistics_kernel",
    "patch_embedding_kernel",
    "patch_embedding_block_sums_kernel",
    "patch_embedding_backward_kernel",
    "scale_kernel",
    "target_coefficients_kernel",
    "weighted_sum_kernel",
)


@pytest.fixture(scope="module")
def launches() -> dict:
    return reachable(DRAWS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_builds_fit_and_can_be_executed(launches, arch, kernel):
    chosen = covering((build for build in launches if build.kernel == kernel), STRENGTH)
    most_spilled = MOST_SPILLED.get(kernel, 0)
    spilled = {}
    for build in chosen:
        launch, case = launches[build]
        with driver_for(arch) as driver, watched(lambda asked, build=build: asked == build):
            launch(**case)
        (compiled,) = (one for one in driver.compiled if one.name == kernel)
        assert compiled.resources.threads <= 1024
        assert compiled.resources.shared <= SHARED_LIMITS.get(arch, 227 * 1024)
        if compiled.resources.spilled > most_spilled or compiled.resources.spills_in_loop:
            spilled[f"{case}"] = compiled.resources
    assert spilled == {}, f"{len(spilled)} of {len(chosen)} builds spill more than {most_spilled} bytes, or in a loop"


@pytest.mark.parametrize("operator", ["cross entropy", "linear", "embedding"])
def test_the_operators_ask_for_nothing_that_is_not_covered(launches, operator):
    """Calls as a user may make them: their builds hold no two facts that are not compiled together somewhere."""
    generator = random.Random(operator)
    call = {"cross entropy": call_cross_entropy, "linear": call_linear, "embedding": call_embedding}[operator]
    covered = {pair for build in launches for pair in build.groups()}
    asked: set[Build] = set()
    with driver_for(90), watched(lambda build: False) as found:
        for _ in range(PUBLIC_CALLS):
            call(generator)
            asked.update(found)
            found.clear()
    assert sorted({pair for build in asked for pair in build.groups()} - covered) == []
    assert len(asked) > PUBLIC_CALLS / 5  # of different kinds


def one_of(generator: random.Random, *values):
    return generator.choice(values)


def matrix(generator: random.Random, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A parameter or an activation: dense, a part of a larger one, transposed, or one row for all."""
    kind = one_of(generator, "dense", "dense", "part", "transposed", "expanded")
    if kind == "part":
        top, left, right = (generator.randrange(20) for _ in range(3))
        x = torch.zeros(top + rows, left + columns + right, dtype=dtype)[top:, left : left + columns]
    elif kind == "transposed":
        x = torch.zeros(columns, rows, dtype=dtype).T
    elif kind == "expanded":
        x = torch.zeros(1, columns, dtype=dtype).expand(rows, columns)
    else:
        x = torch.zeros(rows, columns, dtype=dtype)
    return x.detach().requires_grad_()


def loss_arguments(generator: random.Random, rows: int) -> dict:
    """The target and the options of a loss, numbers also as Python's int."""
    slots = one_of(generator, *SLOTS)
    kind, first = one_of(generator, torch.int32, torch.int64), generator.randrange(3)
    weight = one_of(generator, None, torch.ones(slots))
    return {
        "target": torch.zeros(first + rows, slots, dtype=kind)[first:],
        "target_weight": weight,
        "ignore_index": one_of(generator, -100, 1, 16, *([2**40] if kind == torch.int64 else [])),
        "reduction": one_of(generator, "mean", "sum", "none", "slot_mean"),
        "label_smoothing": one_of(generator, 0, 0.0, 0.1, 1),
        "softcap": one_of(generator, None, 30, 0.5, 1),
        "z_loss_weight": one_of(generator, 0, 0.0, 1e-4, 1),
        "backend": "triton",
    }


def some_size(generator: random.Random, most: int) -> int:
    """A number of any magnitude up to ``most``, in half of the cases divisible by 16."""
    size = int(2 ** generator.uniform(0, 1 + most.bit_length())) % most + 1
    return one_of(generator, size, -(-size // 16) * 16)


def backward(generator: random.Random, result: torch.Tensor) -> None:
    if result.requires_grad and generator.random() < 0.9:
        upstream = torch.zeros(result.shape, dtype=result.dtype)
        result.backward(one_of(generator, upstream, upstream.new_zeros(()).expand(result.shape)))


def call_cross_entropy(generator: random.Random) -> None:
    rows, vocab = generator.randrange(1, 6), some_size(generator, 50257)
    logits = matrix(generator, rows, vocab, one_of(generator, torch.float32, torch.bfloat16, torch.float16))
    backward(generator, patch_cross_entropy(logits, **loss_arguments(generator, rows)))


def call_linear(generator: random.Random) -> None:
    rows, vocab, dtype = (
        generator.randrange(1, 40),
        some_size(generator, 3000),
        one_of(generator, torch.float32, torch.bfloat16, torch.float16),
    )
    x, weight = matrix(generator, rows, 8, dtype), matrix(generator, vocab, 8, dtype)
    bias = one_of(generator, None, torch.zeros(vocab, dtype=dtype, requires_grad=True))
    backward(
        generator,
        linear_patch_cross_entropy(
            x, weight, linear_bias=bias, memory=one_of(generator, "default", "low"),
            logits_bytes=one_of(generator, None, generator.randrange(1, 8 * vocab * rows)),
            **loss_arguments(generator, rows),
        ),
    )  # fmt: skip


def call_embedding(generator: random.Random) -> None:
    slots, vocab, hidden = one_of(generator, *SLOTS), some_size(generator, 3000), some_size(generator, 5000)
    weight = matrix(generator, vocab, hidden, one_of(generator, torch.float32, torch.bfloat16, torch.float16))
    first = generator.randrange(3)
    length = slots * generator.randrange(1, 40)
    ids = torch.zeros(first + length, dtype=one_of(generator, torch.int32, torch.int64))[first:]
    padding_idx = one_of(generator, None, generator.randrange(vocab), generator.randrange(min(vocab, 3)))
    backward(generator, patch_embedding(ids, weight, slots, padding_idx=padding_idx, backend="triton"))


def test_fused_multiply_adds_are_a_choice_of_the_launchers(monkeypatch):
    """Not of Triton's default, which differs between its versions: it decides about last digits and registers."""
    asked = set(reachable(50))
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    assert set(reachable(50)) == asked


def test_aligned_rows_move_in_16_byte_vectors():
    with driver_for(90) as driver:
        plain = (0.0, None, "dense", torch.int64, -100, 0, "few")
        launch_cross_entropy(torch.bfloat16, 128256, 4, "both in place", *plain)
        launch_patch_embedding(torch.bfloat16, 4096, 4, 16, None, "dense", torch.int64, begin=0, total=None)
    for compiled in driver.compiled:
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", compiled.ptx), compiled.name
        assert re.search(r"st\.global[.\w:]*\.v4\.b32", compiled.ptx), compiled.name
    assert len({compiled.name for compiled in driver.compiled}) == 4


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_cover_holds_every_group_of_facts(strength):
    cube = [
        Build("k", frozenset(zip("abcd", values, strict=True)))
        for values in itertools.product("xyz", "xy", "xyzw", "x")
    ]
    chosen = covering(cube, strength)
    assert {g for build in chosen for g in build.groups(strength)} == {g for b in cube for g in b.groups(strength)}
    assert len(chosen) < len(cube) or strength == 3
