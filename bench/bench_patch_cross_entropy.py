"""K-token cross entropy of given logits, with its gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bench import OURS, peers, shapes
from bench.compare import Comparison, Group, copy_of, gradients
from bench.conftest import device, dtypes
from bench.measure import Function
from bench.replay import replay
from patchkernels import patch_cross_entropy, reference

pytestmark = pytest.mark.benchmark(timer=replay)
ONE_PASS = "patchkernels, loss and dlogits in place"
CONTENDERS: tuple[str, ...] = (OURS, "PatchTrain", "PatchTrain, compiled", "dense targets", "Liger", "copy")
if device().type == "cuda":
    CONTENDERS += (ONE_PASS,)


def groups(scale: str) -> list[Group]:
    return [
        Group("-".join(map(str, (dtype, *shape))), CONTENDERS, partial(compare, shape, dtype))
        for shape in shapes.LOGITS[scale]
        for dtype in dtypes()
    ]


def compare(shape: shapes.Logits, dtype: torch.dtype) -> Comparison:
    on = device()
    logits = torch.randn(shape.N, shape.V, device=on, dtype=dtype).requires_grad_()
    target = torch.randint(0, shape.V, (shape.N, shape.K), device=on)
    losses = {
        OURS: patch_cross_entropy,
        "PatchTrain": peers.patch_train,
        "PatchTrain, compiled": torch.compile(peers.patch_train, dynamic=False),
        "dense targets": peers.dense_targets,
        "Liger": peers.liger_cross_entropy(on),
    }
    moved = 2 * logits.numel() * logits.element_size()  # one read and one write of the logits
    wide = logits.detach().float().requires_grad_()
    return Comparison(
        operator="patch_cross_entropy",
        case="forward + backward",
        shape=shape._asdict(),
        dtype=dtype,
        device=on,
        contenders={
            name: peers.bind(loss, lambda f: lambda: gradients(lambda z: f(z, target), [logits]))
            for name, loss in losses.items()
        },
        exact=lambda: gradients(lambda z: reference.patch_cross_entropy(z, target), [wide]),
        floor="copy",
        floors={"copy": copy_of(moved, on)} | in_one_pass(logits.detach().clone(), target),  # may be overwritten
        bytes=moved,
    )


def in_one_pass(logits: Tensor, target: Tensor) -> dict[str, Function]:
    """On a GPU, the kernel that the fused linear loss runs on a chunk of logits: dlogits replace the logits.

    It is no contender and is not checked, because it may only be called on logits that are not needed afterwards.
    """
    if ONE_PASS not in CONTENDERS:
        return {}
    from patchkernels.kernels.cross_entropy import loss_and_gradient_
    from patchkernels.numerics import LossOptions

    c = torch.full(target.shape, 1 / target.numel(), device=logits.device)
    losses = torch.empty_like(c)
    return {ONE_PASS: lambda: loss_and_gradient_(logits, target, c, losses, LossOptions())}


def test_patch_cross_entropy(comparison, contender, record):
    record(comparison, contender)
