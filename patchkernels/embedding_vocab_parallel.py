"""Patch embedding of a table whose rows, the vocabulary, are sharded over processes.

    out[p] = (1/K) sum over ranks of sum_k [id_pk in shard] weight_r[id_pk - first]

Every process holds the same ids and its own rows. The sum over ranks is taken in fp32 and cast once; the gradient of
a shard needs no communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchkernels.parallel import VocabShard, sum_
from patchkernels.patch_embedding import accumulation_dtype, check_ids, inverse_counts


class VocabParallelEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int | None, shard: VocabShard, backend: str) -> Tensor:
        out: Tensor = torch.ops.patchkernels.embedding_vocab_parallel(ids, weight, padding_idx, *shard)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, weight, ctx.padding_idx, ctx.shard, ctx.backend = inputs
        ctx.rows = len(weight)
        ctx.save_for_backward(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        ids, grad = ids.reshape(-1, ids.shape[-1]), grad.reshape(-1, grad.shape[-1])
        inside = _inside(ids, ctx.rows, ctx.shard.first, ctx.padding_idx)
        # what is not ours is padding to the operator, which divides by the tokens that are none
        local = torch.where(inside, ids - ctx.shard.first, ctx.rows)
        dtype = accumulation_dtype(grad.dtype)
        if ids.shape[1] > 1:
            scale = inside.sum(1).to(dtype) * inverse_counts(ids, ctx.padding_idx, dtype)
            grad_rows = grad.to(dtype) * scale.unsqueeze(1)
        else:
            grad_rows = grad.to(dtype)
        op = torch.ops.patchkernels.patch_embedding_backward
        total = op(grad_rows, local, ctx.rows + 1, ctx.rows, ctx.backend)[: ctx.rows]
        return None, total.to(grad.dtype), None, None, None


@torch.library.custom_op("patchkernels::embedding_vocab_parallel", mutates_args=())
def _forward(ids: Tensor, weight: Tensor, padding_idx: int | None, first: int, vocab: int, group: str) -> Tensor:
    check_ids(ids, vocab)
    *shape, patch_size = ids.shape
    ids = ids.reshape(-1, patch_size)
    dtype = accumulation_dtype(weight.dtype)
    # -0.0 + x is x to the bit, -0.0 among it
    total = torch.full((len(ids), weight.shape[1]), -0.0, dtype=dtype, device=weight.device)
    if len(weight):
        # for K = 1 this is F.embedding, padding row included
        inside = _inside(ids, len(weight), first, padding_idx if patch_size > 1 else None)
        for slot, ours in zip(ids.T, inside.T):  # never an (N K, D) intermediate
            rows = weight[(slot - first).clamp(0, len(weight) - 1)]
            total += rows.masked_fill_(~ours.unsqueeze(1), -0.0)
    sum_(total, group)
    if patch_size > 1:
        total *= inverse_counts(ids, padding_idx, dtype).unsqueeze(1)
    bad = ((ids < 0) | (ids >= vocab)).any(1, keepdim=True)
    out = total.masked_fill_(bad, torch.nan).to(weight.dtype)
    return out.resize_(*shape, weight.shape[1])  # no view: the caller may change it in place


@_forward.register_fake
def _(ids: Tensor, weight: Tensor, padding_idx: int | None, first: int, vocab: int, group: str) -> Tensor:
    return weight.new_empty(*ids.shape[:-1], weight.shape[1])


def _inside(ids: Tensor, rows: int, first: int, padding_idx: int | None) -> Tensor:
    """Which ids are of this shard, padding left out."""
    inside = (ids >= first) & (ids < first + rows)
    return inside if padding_idx is None else inside & (ids != padding_idx)
