"""The bytes that each kernel is said to move are those that its compiled code moves, executed as PTX."""

from __future__ import annotations

import math

import pytest
import torch
import triton_on_cpu

if not triton_on_cpu.ARCHITECTURE:
    pytest.skip("kernels are compiled only with PTX_MACHINE set", allow_module_level=True)

import triton

from bench.fake_cuda import KERNEL_MODULES
from patchkernels.kernels import cross_entropy, patch_embedding, scaling, targets
from patchkernels.kernels.traffic import TRAFFIC
from patchkernels.numerics import LossOptions, new_statistics

ROWS, SLOTS = 3, 4


class Recorded:
    """A kernel that keeps what it is launched with."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            bound = dict(zip(self.kernel.arg_names, args)) | kwargs
            self.found.append((self.kernel.__name__, grid, bound))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launched(monkeypatch):
    """The launches: a kernel's name, its grid and its arguments."""
    found = []
    for module in KERNEL_MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), found))
    return found


@pytest.fixture
def check(launched):
    def checked(function, *arguments, kernels: list[str], again: int, **options) -> None:
        """The bytes of every launch of the call, which are of these kernels.

        ``again``: bytes of a row, or id, that each warp may read once more. Targets, statistics, places of tokens.
        """
        launched.clear()
        with triton.runtime.driver.active.record() as launches:
            function(*arguments, **options)
        assert [name for name, *_ in launched] == kernels and len(launches) == len(kernels)
        for (name, grid, bound), launch in zip(launched, launches):
            counted = [launch.counters.traffic.get(f"global {kind}") for kind in ("load", "store")]
            useful = [0 if traffic is None else traffic.useful for traffic in counted]
            said = TRAFFIC[name](grid, bound)
            pieces = bound["N"] if "cross_entropy" in name else math.prod(grid) * bound.get("IDS", 1)
            margin = again * pieces * bound["num_warps"]
            assert useful == pytest.approx([said.read + said.read_again, said.written], rel=0, abs=margin), name
            if said.read_again:
                assert launch.counters.unique_read == pytest.approx(said.read, rel=0, abs=margin)

    return checked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [LossOptions(), LossOptions(label_smoothing=0.1, softcap=5.0, z_loss_weight=0.01)])
@pytest.mark.parametrize("vocab", [32000, 32016 + 1])
def test_cross_entropy(check, vocab, options, dtype):
    logits, target = torch.randn(ROWS, vocab).to(dtype), torch.randint(0, vocab, (ROWS, SLOTS))
    c, losses = torch.rand(ROWS, SLOTS), torch.empty(ROWS, SLOTS)
    _, statistics = cross_entropy.loss(logits, target, options)
    kernels = ["patch_cross_entropy_kernel"]
    check(cross_entropy.loss, logits, target, options, kernels=kernels, again=200)
    check(cross_entropy.logits_gradient, c, logits, target, statistics, options, kernels=kernels, again=200)
    buffer = cross_entropy.logits_buffer(ROWS, torch.empty(vocab, 1, dtype=dtype)).copy_(logits)
    check(cross_entropy.loss_and_gradient_, buffer, target, c, losses, options, kernels=kernels, again=200)
    check(cross_entropy.loss_and_gradient_, buffer, target, None, losses, options, kernels=kernels, again=200)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_slices(check, smoothing):
    options, columns, vocab = LossOptions(label_smoothing=smoothing), 20000, 50257
    target, c = torch.randint(0, vocab, (ROWS, SLOTS)), torch.rand(ROWS, SLOTS)
    target[:, 0] = torch.arange(ROWS)  # the others may be in the slice or not: they are too few to matter
    logits = torch.randn(ROWS, columns)
    statistics, picked = new_statistics(target, torch.float32)
    check(
        cross_entropy.slice_statistics_, logits, 0, target, statistics, picked, options, keep_logits=True,
        kernels=["slice_statistics_kernel"], again=200,
    )  # fmt: skip
    check(
        cross_entropy.slice_gradient_, logits, 0, vocab, target, c, statistics[:2].exp(), options,
        kernels=["patch_cross_entropy_kernel"], again=200,
    )  # fmt: skip


@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("hidden", [512, 1000])
def test_patch_embedding(check, hidden, slots, padding_idx):
    """Ids are all different, and none is padding."""
    vocab = 400
    ids = 8 + torch.randperm(vocab - 8)[:256].view(-1, slots)
    table = torch.randn(vocab, hidden)
    check(patch_embedding.forward, ids, table, padding_idx, kernels=["patch_embedding_kernel"], again=40)
    check(
        patch_embedding.backward, torch.randn(len(ids), hidden), ids, vocab, padding_idx,
        kernels=["patch_embedding_block_sums_kernel", "patch_embedding_backward_kernel"], again=40,
    )  # fmt: skip
    total = torch.randn(vocab, hidden).bfloat16()
    check(
        patch_embedding.add_gradient_, total, torch.randn(len(ids), hidden), ids, padding_idx,
        kernels=["patch_embedding_block_sums_kernel", "patch_embedding_backward_kernel"], again=40,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaling(check, dtype):
    values, scale, one = torch.randn(70, 333).to(dtype), torch.tensor(3.0), torch.ones(())
    out = torch.empty(70, 333, dtype=torch.bfloat16)
    check(scaling.scale_into, out, values, scale, kernels=["scale_kernel"], again=4)
    check(scaling.scale_, values, one, kernels=["scale_kernel"], again=4)
    with pytest.raises(AssertionError, match="scale_kernel"):  # by another number everything moves
        check(scaling.scale_, values, scale, kernels=["scale_kernel"], again=4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "slot_mean"])
@pytest.mark.parametrize("slots", [1, 3])
def test_targets(check, slots, reduction, weighted):
    target = torch.randint(0, 99, (5000, slots))
    weight = torch.rand(slots) if reduction == "slot_mean" else torch.rand(5000, slots)
    arguments = (target, weight if weighted else None, -100, reduction, False, torch.float32)
    check(targets.coefficients, *arguments, kernels=["target_coefficients_kernel"], again=200)
    check(targets.weighted_sum, weight.expand(5000, slots).contiguous(), 1 + target.float(),
          kernels=["weighted_sum_kernel"], again=4)  # fmt: skip
