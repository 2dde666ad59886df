"""Kernels are launched on the GPU of their tensors, whichever GPU is the current one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from patchkernels.numerics import LossOptions
from patchkernels.training.processes import Processes, joined

KERNEL_MODULES = pytest.importorskip("bench.fake_cuda").KERNEL_MODULES
cross_entropy, patch_embedding, scaling, targets = KERNEL_MODULES


@pytest.fixture
def launches(monkeypatch):
    """The device of every launch: of the tensor that the guard around it was given, or None without a guard."""
    current, found = [None], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: found.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in KERNEL_MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel())
    return found


def test_every_launch_is_guarded(launches):
    logits, target, c = torch.randn(2, 100), torch.zeros(2, 3, dtype=torch.long), torch.rand(2, 3)
    options = LossOptions()
    losses, statistics = cross_entropy.loss(logits, target, options)
    cross_entropy.logits_gradient(c, logits, target, statistics, options)
    cross_entropy.loss_and_gradient_(logits, target, c, losses, options)
    cross_entropy.slice_statistics_(logits, 0, target, torch.zeros(3, 2), losses, options, keep_logits=True)
    cross_entropy.slice_gradient_(logits, 0, 100, target, c, statistics, options)
    ids, weight = torch.zeros(100, 2, dtype=torch.long), torch.randn(5, 8)
    patch_embedding.forward(ids, weight, None)
    patch_embedding.backward(torch.randn(100, 8), ids, 5, None)
    scaling.scale_into(logits, logits, torch.ones(()))
    scaling.scale_(logits, torch.ones(()))
    targets.coefficients(target, None, -100, "mean", False, torch.float32)
    targets.weighted_sum(losses, c)
    assert launches == [torch.device("cpu")] * 12


@pytest.mark.parametrize(("name", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_run_makes_its_gpu_the_current_one(monkeypatch, name, chosen):
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(str(device)))
    with joined(Processes(torch.device(name))):
        assert found == chosen
