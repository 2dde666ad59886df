"""Patch embedding: forward, and forward with the gradient of the table."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import OURS, peers, shapes
from bench.compare import Comparison, Contender, Group, copy_of, gradients
from bench.conftest import device, dtypes
from bench.replay import replay
from patchkernels import patch_embedding, reference

pytestmark = pytest.mark.benchmark(timer=replay)
CONTENDERS = (OURS, "embedding().mean()", "embedding().mean(), compiled", "F.embedding_bag", "copy")


def groups(scale: str) -> list[Group]:
    return [
        Group("-".join(map(str, (case, dtype, *shape))), CONTENDERS, partial(compare, shape, case, dtype))
        for shape in shapes.EMBEDDING[scale]
        for case in ("forward", "forward + backward")
        for dtype in dtypes()
    ]


def token_ids(shape: shapes.Embedding) -> Tensor:
    """Ids of shape (N, K), the same at every call.

    With ``"zipf"`` the probability of the r-th most frequent id is proportional to 1 / r, as that of words is. With
    V = 32000, about 9 % of the tokens are the most frequent id.
    """
    generator = torch.Generator().manual_seed(0)
    if shape.ids == "uniform":
        ids = torch.randint(0, shape.V, (shape.tokens,), generator=generator)
    else:
        probability = 1 / torch.arange(1, shape.V + 1, dtype=torch.float64)
        rank = torch.multinomial(probability, shape.tokens, replacement=True, generator=generator)
        ids = torch.randperm(shape.V, generator=generator)[rank]
    return ids.reshape(-1, shape.patch_size)


def compare(shape: shapes.Embedding, case: str, dtype: torch.dtype) -> Comparison:
    on = device()
    ids = token_ids(shape).to(on)
    weight = torch.randn(shape.V, shape.D, device=on, dtype=dtype)
    patches, size = len(ids), weight.element_size()
    upstream = torch.randn(patches, shape.D, device=on, dtype=dtype)

    def flattened(function: Any) -> Any:
        return lambda ids, weight: function(ids.flatten(), weight, shape.patch_size)

    functions = {
        OURS: flattened(patch_embedding),
        "embedding().mean()": peers.embedding_mean,
        "embedding().mean(), compiled": torch.compile(peers.embedding_mean, dynamic=False),
        "F.embedding_bag": peers.embedding_bag,
    }
    moved = size * shape.D * (ids.numel() + patches)  # rows of the table are read, means written
    if case == "forward + backward":
        moved += size * shape.D * (patches + shape.V)  # gradients of the means are read, that of the table written

    def contender(function: Any, weight: Tensor = weight, upstream: Tensor = upstream) -> Contender:
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
        exact=contender(flattened(reference.patch_embedding), weight.float(), upstream.float()),
        floor="copy",
        floors={"copy": copy_of(moved, on)},
        bytes=moved,
        budget_seconds=1.0,
    )


def test_patch_embedding(comparison, contender, record):
    record(comparison, contender)
