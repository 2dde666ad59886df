"""Patch embedding, forward and with its gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bench import peers, shapes
from bench.compare import OURS, Comparison, Group, copy_of, gradients
from bench.conftest import device
from bench.replay import replay
from patchkernels import patch_embedding, reference

pytestmark = pytest.mark.benchmark(timer=replay)
CONTENDERS = (OURS, "embedding().mean()", "embedding().mean(), compiled", "F.embedding_bag", "copy")


def groups(scale: str) -> list[Group]:
    return [
        Group("-".join(map(str, (case, *shape))), CONTENDERS, partial(compare, shape, case))
        for shape in shapes.EMBEDDING[scale]
        for case in ("forward", "forward + backward")
    ]


def token_ids(shape: shapes.Embedding) -> Tensor:
    """(N, K). Zipf: the id of rank r has probability ~ 1 / r, so that the first is about 9 % of V = 32000."""
    generator = torch.Generator().manual_seed(0)
    if shape.ids == "uniform":
        ids = torch.randint(0, shape.V, (shape.tokens,), generator=generator)
    else:
        probability = 1 / torch.arange(1, shape.V + 1, dtype=torch.float64)
        rank = torch.multinomial(probability, shape.tokens, replacement=True, generator=generator)
        ids = torch.randperm(shape.V, generator=generator)[rank]
    return ids.reshape(-1, shape.patch_size)


def compare(shape: shapes.Embedding, case: str) -> Comparison:
    on = device()
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    ids = token_ids(shape).to(on)
    weight = torch.randn(shape.V, shape.D, device=on, dtype=dtype)
    patches, size = len(ids), weight.element_size()
    upstream = torch.randn(patches, shape.D, device=on, dtype=dtype)
    ours = lambda ids, weight: patch_embedding(ids.flatten(), weight, shape.patch_size)  # noqa: E731
    exact = lambda ids, weight: reference.patch_embedding(ids.flatten(), weight, shape.patch_size)  # noqa: E731
    functions = {
        OURS: ours,
        "embedding().mean()": peers.embedding_mean,
        "embedding().mean(), compiled": torch.compile(peers.embedding_mean, dynamic=False),
        "F.embedding_bag": peers.embedding_bag,
    }
    moved = size * shape.D * (ids.numel() + patches)  # rows of the table in, means out
    if case == "forward + backward":
        moved += size * shape.D * (patches + shape.V)  # gradient of the patches in, of the table out

    def contender(function, weight=weight, upstream=upstream):
        if case == "forward":
            return lambda: [function(ids, weight)]
        leaf = weight.detach().requires_grad_()
        return lambda: gradients(lambda w: function(ids, w), [leaf], upstream)

    return Comparison(
        operator="patch_embedding",
        case=case,
        shape={"K": shape.patch_size, "V": shape.V, "D": shape.D, "tokens": shape.tokens, "ids": shape.ids},
        dtype=dtype,
        device=on,
        contenders={name: contender(function) for name, function in functions.items()},
        exact=contender(exact, weight.float(), upstream.float()),
        floor="copy",
        floors={"copy": copy_of(moved, on)},
        bytes=moved,
        budget_seconds=1.0,
    )


def test_patch_embedding(comparison, contender, record):
    record(comparison, contender)
