"""The kernels as a launch really compiles them, with the block sizes of a real run, executed as PTX.

The operators' own tests compare values, with small blocks. Here the question is whether the result could depend on
which warp runs first: the machine looks for races and for accesses out of bounds, and every order must give the same
bits.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton_on_cpu

if not triton_on_cpu.ARCHITECTURE:
    pytest.skip("kernels are compiled only with PTX_MACHINE set", allow_module_level=True)

import triton
from ptx_machine.machine import ORDERS

from patchkernels import patch_cross_entropy
from patchkernels.kernels import cross_entropy, patch_embedding
from patchkernels.numerics import LossOptions, new_statistics

ROWS, SLOTS = 3, 4
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = (LossOptions(), LossOptions(label_smoothing=0.1, softcap=5.0, z_loss_weight=0.01))


def in_every_order(function) -> list[torch.Tensor]:
    """What the function returns, which must be the same bits in every order of the warps."""
    driver = triton.runtime.driver.active
    suite, results = driver.options, []
    try:
        for order in ORDERS:
            driver.options = dataclasses.replace(suite, order=order, seed=1)
            results.append(function())
    finally:
        driver.options = suite
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    return results[0]


def logits_and_targets(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target = torch.randint(0, vocab, (ROWS, SLOTS))
    target[1, 2] = -100
    return 2 * torch.randn(ROWS, vocab).to(dtype), target, torch.rand(ROWS, SLOTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("vocab", [7, 512, 1000, 5000, 8192])
def test_cross_entropy_in_place_is_what_it_is_apart(vocab, options, dtype):
    logits, target, c = logits_and_targets(vocab, dtype)

    def apart():
        losses, statistics = cross_entropy.loss(logits, target, options)
        return losses, statistics, cross_entropy.logits_gradient(c, logits, target, statistics, options)

    losses, statistics, gradient = in_every_order(apart)

    def in_place():
        buffer, filled = logits.clone(), torch.empty(ROWS, SLOTS)
        return filled, cross_entropy.loss_and_gradient_(buffer, target, c, filled, options)

    filled, overwritten = in_every_order(in_place)
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}  # other builds fuse other products
    torch.testing.assert_close(filled, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(overwritten, gradient, **tolerance)

    def slice_in_place():
        return [cross_entropy.slice_gradient_(logits.clone(), 0, vocab, target, c, statistics, options)]

    torch.testing.assert_close(in_every_order(slice_in_place)[0], gradient, **tolerance)


@pytest.mark.parametrize("vocab", [100, 5000])
def test_statistics_of_slices(vocab):
    logits, target, _ = logits_and_targets(vocab, torch.bfloat16)

    def run():
        statistics, picked = new_statistics(target, torch.float32)
        cross_entropy.slice_statistics_(logits, 0, target, statistics, picked, OPTIONS[1], keep_logits=True)
        return statistics, picked

    in_every_order(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 16, 24, 100, 200, 400, 768])
@pytest.mark.parametrize("slots", [1, 3])
def test_patch_embedding(slots, hidden, dtype):
    ids = torch.where(torch.rand(70, slots) < 0.7, 2, torch.randint(0, 9, (70, slots)))
    weight, gradient = torch.randn(9, hidden).to(dtype), torch.randn(70, hidden).to(dtype)
    in_every_order(lambda: [patch_embedding.forward(ids, weight, 4)])
    in_every_order(lambda: [patch_embedding.backward(gradient, ids, 9, 4)])

    def add():
        patch_embedding.add_gradient_(total := weight.clone(), gradient, ids, 4)
        return [total]

    in_every_order(add)


def test_rows_of_a_view_are_not_read_past_the_storage():
    """The last row has no padding behind it, though the stride of the rows leaves room."""
    storage = torch.randn(2, 32)
    view, target = storage[:, 22:], torch.zeros(2, 1, dtype=torch.long)
    losses = patch_cross_entropy(view, target, backend="triton", reduction="none")
    torch.testing.assert_close(losses, patch_cross_entropy(view, target, backend="eager", reduction="none"))
