"""Operator 1, patch embedding: the mean of K token embeddings, forward and backward.

    out[..., p, :] = (1/K) sum_k weight[input_ids[..., p K + k], :]
    dW[v]          = (1/K) sum over occurrences of v of dout[p]

The Triton kernels are in ``kernels/patch_embedding.py``; this file holds the contract, the eager code that serves
CPUs, and the registration: custom ops with fakes, called by an ``autograd.Function``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchkernels import backend as _backend
from patchkernels.parallel import like, replicated, vocab_shard


def patch_embedding(
    input_ids: Tensor,  # (..., T), int32 or int64
    weight: Tensor,  # (V, D)
    patch_size: int,
    *,
    padding_idx: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # (..., T / K, D)
    r"""``out[..., p, :] = (1/K) sum_k weight[input_ids[..., p*K + k], :]``

    The input of a patch is the mean of the embeddings of its ``patch_size`` tokens (PatchTrain, arXiv 2407.12665,
    section 2; TST, arXiv 2605.06546). The sum is taken in fp32 and cast once. The gradient is summed in fp32 in a
    fixed order, so that it is the same to the last bit from run to run.

    Args:
        input_ids: token ids, shape ``(..., T)`` with T divisible by ``patch_size``, int32 or int64.
        weight: the embedding matrix, shape ``(V, D)``; float32, bfloat16 or float16 (float64 too on the eager path).
        patch_size: K, at least 1. At K = 1 this is ``F.embedding``, bit for bit, padding row included.
        padding_idx: tokens with this id are left out of the mean, as in ``F.embedding_bag``, and have no gradient;
            for K > 1 a patch of nothing but padding is zero.
        process_group: the table is sharded by its rows: every process gives its own, shape ``(V_r, D)``, in the order
            of ranks and as many as it has, and the same ids; the result is the same on all processes. A table that is a
            DTensor of placements ``Shard(0)`` says so itself. See :mod:`patchkernels.embedding_vocab_parallel`.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        shape ``(..., T / K, D)``, the dtype of ``weight``.

    Raises:
        ValueError: K < 1, T not divisible by K, ``weight`` not 2-D, ``padding_idx`` outside the table, two devices.
        TypeError: ids that are not integers, a weight that is not floating point.
        IndexError: an id outside [0, V), on a CPU. On a GPU, where raising would cost a synchronisation, the
            patch of such an id is NaN and no memory outside ``weight`` is read.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (V, D), got {tuple(weight.shape)}")
    if input_ids.ndim == 0:
        raise ValueError("input_ids must have shape (..., T), got a scalar")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if input_ids.device != weight.device:
        raise ValueError(f"input_ids is on {input_ids.device} but weight is on {weight.device}")
    given = input_ids
    input_ids = replicated(input_ids, "input_ids")
    weight, shard = vocab_shard(weight, process_group, "weight")
    tokens, vocab = input_ids.shape[-1], shard.vocab if shard else weight.shape[0]
    if tokens % patch_size:
        raise ValueError(
            f"the number of tokens must be divisible by patch_size, got input_ids of shape "
            f"{tuple(input_ids.shape)} and patch_size={patch_size}"
        )
    if padding_idx is not None:
        if not -vocab <= padding_idx < vocab:
            raise ValueError(f"padding_idx must be in [{-vocab}, {vocab}), got {padding_idx}")
        padding_idx %= vocab
    patches = input_ids.unflatten(-1, (tokens // patch_size, patch_size))
    engine = _backend.resolve(backend, weight)
    if shard:
        from patchkernels.embedding_vocab_parallel import VocabParallelEmbedding

        out: Tensor = VocabParallelEmbedding.apply(patches, weight, padding_idx, shard, engine)
    else:
        out = _PatchEmbedding.apply(patches, weight, padding_idx, engine)
    return like(out, given)


class _PatchEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int | None, backend: str) -> Tensor:
        out: Tensor = torch.ops.patchkernels.patch_embedding(ids, weight, padding_idx, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None, str], output: Tensor) -> None:
        ids, weight, ctx.padding_idx, ctx.backend = inputs
        ctx.vocab = weight.shape[0]
        ctx.save_for_backward(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        op = torch.ops.patchkernels.patch_embedding_backward
        return None, op(grad, ids, ctx.vocab, ctx.padding_idx, ctx.backend), None, None


@torch.library.custom_op("patchkernels::patch_embedding", mutates_args=())
def _forward(
    ids: Tensor,  # (..., K)
    weight: Tensor,
    padding_idx: int | None,
    backend: str,
) -> Tensor:  # (..., D)
    patches = ids.reshape(-1, ids.shape[-1])
    if backend == "triton":
        from patchkernels.kernels import patch_embedding as kernels

        out = kernels.forward(patches, weight, padding_idx)
    else:
        out = _eager_forward(patches, weight, padding_idx)
    return out.resize_(*ids.shape[:-1], weight.shape[1])  # a view could not be changed in place by the caller


@_forward.register_fake
def _(ids: Tensor, weight: Tensor, padding_idx: int | None, backend: str) -> Tensor:
    return weight.new_empty(*ids.shape[:-1], weight.shape[1])


@torch.library.custom_op("patchkernels::patch_embedding_backward", mutates_args=())
def _backward(grad: Tensor, ids: Tensor, vocab: int, padding_idx: int | None, backend: str) -> Tensor:
    grad, ids = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1, ids.shape[-1])
    if backend == "triton":
        from patchkernels.kernels import patch_embedding as kernels

        return kernels.backward(grad, ids, vocab, padding_idx)
    return _eager_backward(grad, ids, vocab, padding_idx)


@_backward.register_fake
def _(grad: Tensor, ids: Tensor, vocab: int, padding_idx: int | None, backend: str) -> Tensor:
    return grad.new_empty(vocab, grad.shape[-1])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for what is narrower, the dtype itself otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_counts(ids: Tensor, padding_idx: int | None, dtype: torch.dtype) -> Tensor:
    """``1 / (tokens of each patch that are not padding)``, shape ``(N,)``; 1 for a patch of padding alone."""
    patches, patch_size = ids.shape
    if padding_idx is None or patch_size == 1:
        return torch.full((patches,), 1 / patch_size, dtype=dtype, device=ids.device)
    return (ids != padding_idx).sum(-1).clamp(min=1).to(dtype).reciprocal()


def check_ids(ids: Tensor, vocab: int) -> None:
    """IndexError for an id outside [0, V), where looking costs no synchronisation."""
    if ids.device.type == "cpu" and ids.numel():
        for extreme in ids.aminmax():
            if not 0 <= extreme < vocab:
                raise IndexError(f"token ids must be in [0, {vocab}), got {extreme.item()}")


def _eager_forward(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    vocab = weight.shape[0]
    bad = None
    if ids.device.type != "cpu":
        bad = ((ids < 0) | (ids >= vocab)).any(1, keepdim=True)
        ids = ids.clamp(0, max(vocab - 1, 0))
    check_ids(ids, vocab)
    patch_size = ids.shape[1]
    if patch_size == 1:
        out = F.embedding(ids[:, 0], weight)
    elif weight.dtype == accumulation_dtype(weight.dtype):
        out = F.embedding_bag(ids.long(), weight, mode="mean", padding_idx=padding_idx)
    else:  # embedding_bag would round the sum to 16 bits before it divides
        total = torch.zeros(len(ids), weight.shape[1], dtype=torch.float32, device=weight.device)
        for slot in ids.T:
            rows = weight[slot]
            total += rows if padding_idx is None else rows.masked_fill_((slot == padding_idx).unsqueeze(1), 0)
        out = total.mul_(inverse_counts(ids, padding_idx, torch.float32).unsqueeze(1)).to(weight.dtype)
    return out if bad is None else out.masked_fill_(bad, torch.nan)


def _eager_backward(grad: Tensor, ids: Tensor, vocab: int, padding_idx: int | None) -> Tensor:
    dtype = accumulation_dtype(grad.dtype)
    scaled = grad.to(dtype) * inverse_counts(ids, padding_idx, dtype).unsqueeze(1)
    total = scaled.new_zeros(vocab, grad.shape[1])
    for slot in range(ids.shape[1]):  # K passes over N rows: never an (N K, D) intermediate
        total.index_add_(0, ids[:, slot].clamp(0, vocab - 1), scaled)
    if padding_idx is not None:
        total[padding_idx] = 0
    return total.to(grad.dtype)
