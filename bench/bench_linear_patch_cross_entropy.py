"""K-token cross entropy with the head fused in: the loss with its gradients, and the loss alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import OURS, peers, shapes
from bench.compare import Comparison, Contender, Group, gradients
from bench.conftest import device, dtypes
from bench.replay import replay
from patchkernels import linear_patch_cross_entropy, reference

pytestmark = pytest.mark.benchmark(timer=replay)
LOW_MEMORY = "patchkernels, memory=low"
FLOOR = "the bare matrix products"
ONE_TARGET = "F.cross_entropy of one target"  # of the K, so that it does less
CONTENDERS = (OURS, LOW_MEMORY, "PatchTrain", "PatchTrain, compiled", "F.linear_cross_entropy",
              "F.linear_cross_entropy, chunked", "Liger", "CCE", "QuACK", "Megatron", ONE_TARGET, FLOOR)  # fmt: skip


def groups(scale: str) -> list[Group]:
    return [
        Group("-".join(map(str, (case, dtype, *shape))), CONTENDERS, partial(compare, shape, case, dtype))
        for shape in shapes.LINEAR[scale]
        for case in ("forward + backward", "loss only")
        for dtype in dtypes()
    ]


def compare(shape: shapes.Linear, case: str, dtype: torch.dtype) -> Comparison:
    on = device()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.N, shape.D, generator=generator).to(on, dtype)
    weight = (torch.randn(shape.V, shape.D, generator=generator) / shape.D**0.5).to(on, dtype)
    target = torch.randint(0, shape.V, (shape.N, shape.K), generator=generator).to(on)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]

    def contender(loss: Any, leaves: list[Tensor] = leaves) -> Contender:
        if case == "forward + backward":
            return lambda: gradients(lambda x, w: loss(x, w, target), leaves)

        def loss_only() -> list[Tensor]:
            with torch.no_grad():
                return [loss(*leaves, target)]

        return loss_only

    # Rows at aligned addresses, as a product that is called the floor must have them.
    logits = torch.randn(shape.N, -(-shape.V // 64) * 64, device=on, dtype=dtype)[:, : shape.V]

    @torch.no_grad()
    def products() -> list[Tensor]:
        torch.mm(x, weight.T, out=logits)
        return [logits] if case == "loss only" else [logits @ weight, logits.T @ x]

    def one_target(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target[:, 0])

    losses = {
        OURS: linear_patch_cross_entropy,
        LOW_MEMORY: partial(linear_patch_cross_entropy, memory="low"),
        **peers.linear_losses(on),
    }
    return Comparison(
        operator="linear_patch_cross_entropy",
        case=case,
        shape=shape._asdict(),
        dtype=dtype,
        device=on,
        contenders={name: peers.bind(loss, contender) for name, loss in losses.items()},
        exact=contender(reference.linear_patch_cross_entropy, wide),
        floor=FLOOR,
        floors={FLOOR: products, ONE_TARGET: contender(one_target)},
        flops=2 * shape.N * shape.D * shape.V * (1 if case == "loss only" else 3),
    )


def test_linear_patch_cross_entropy(comparison, contender, record):
    record(comparison, contender)
