"""Patch embedding: the mean of K token embeddings, forward and backward.

    out[..., p, :] = (1/K) sum_k weight[input_ids[..., p K + k], :]
    dW[v]          = (1/K) sum over occurrences of v of dout[p]

The table may be sharded by its rows over processes: every process holds the same ids and its own rows, the sum over
processes is taken in fp32 and rounded once, and the gradient of a shard needs no communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import (
    accumulation_dtype,
    check_class_dtype,
    check_float_dtype,
    check_ids,
    check_patch_size,
    inverse_counts,
)
from patchkernels.ops.backend import choose_backend, implementation
from patchkernels.ops.derivatives import Function, check_transforms, first_derivative_only, is_mapped
from patchkernels.ops.registration import fake, operator
from patchkernels.ops.tied import is_owned, mark_tied
from patchkernels.ops.vocab_shard import VocabShard, as_replicated, replicated, sum_, vocab_shard


def patch_embedding(
    input_ids: Tensor,  # (..., T), int32 or int64
    weight: Tensor,  # (V, D)
    patch_size: int,
    *,
    padding_idx: int | None = None,
    return_weight: bool = False,
    backend: str = "auto",
) -> Any:  # (..., T / K, D)
    r"""``out[..., p, :] = (1/K) sum_k weight[input_ids[..., p*K + k], :]``

    The input of a patch is the mean of the embeddings of its ``patch_size`` tokens (PatchTrain, arXiv 2407.12665,
    section 2; TST, arXiv 2605.06546). The sum is taken in fp32 and rounded once. The gradient is summed in fp32 in a
    fixed order, so that it is the same to the last bit from run to run.

    Args:
        input_ids: token ids, shape ``(..., T)`` with T divisible by ``patch_size``, int32 or int64.
        weight: the embedding matrix, shape ``(V, D)``; float32, bfloat16 or float16 (float64 too in the eager backend).
            A DTensor of placements ``Shard(0)`` is a table sharded by its rows: ``input_ids`` is then a replicated
            DTensor on the same mesh, and so is the result.
        patch_size: K, at least 1. At K = 1 this is ``F.embedding``, bit for bit, padding row included.
        padding_idx: tokens with this id are left out of the mean, as in ``F.embedding_bag``, and have no gradient;
            for K > 1 a patch of nothing but padding is zero.
        return_weight: returns ``(out, weight)``. Where the second is given to :func:`linear_patch_cross_entropy` as its
            head, the gradients of ``out`` are added to the head's gradient in its own memory, instead of becoming a
            second ``(V, D)`` matrix that is then added to the first. A hook on it must not keep its gradient.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        shape ``(..., T / K, D)``, the dtype of ``weight``.

    Raises:
        ValueError: K < 1, T not divisible by K, ``weight`` not 2-D or sharded otherwise than by rows, ``padding_idx``
            outside the table, ids and weight on different devices, or only one of them a DTensor.
        TypeError: dtypes other than those above.
        RuntimeError: a backend that cannot run (Triton's does not take float64); a gradient of a gradient.
        NotImplementedError: a call under ``torch.func.vmap`` or with forward-mode tangents (``jvp``, ``jacfwd``).
        IndexError: an id outside [0, V), on a CPU. On a GPU, where raising would cost a synchronisation, the
            patch of such an id is NaN and no memory outside ``weight`` is read.
    """
    check_transforms("patch_embedding", weight)
    _check_arguments(input_ids, weight, patch_size)
    ids = replicated(input_ids, "input_ids")
    local, shard = vocab_shard(weight, "weight", input_ids, "input_ids")
    tokens, vocab = ids.shape[-1], shard.vocab if shard else weight.shape[0]
    if tokens % patch_size:
        raise ValueError(
            f"the number of tokens must be divisible by patch_size, got input_ids of shape "
            f"{tuple(ids.shape)} and patch_size={patch_size}"
        )
    if padding_idx is not None:
        if not -vocab <= padding_idx < vocab:
            raise ValueError(f"padding_idx must be in [{-vocab}, {vocab}), got {padding_idx}")
        padding_idx %= vocab
    patches = ids.unflatten(-1, (tokens // patch_size, patch_size))
    backend = choose_backend(backend, weight, weight.dtype)
    if shard:
        out: Tensor = as_replicated(
            _ShardedPatchEmbedding.apply(patches, local, padding_idx, shard, backend), input_ids
        )
        return (out, weight) if return_weight else out
    if return_weight:
        out, tied = _TiedPatchEmbedding.apply(patches, local, padding_idx, backend)
        return out, mark_tied(tied)
    return _PatchEmbedding.apply(patches, local, padding_idx, backend)


def _check_arguments(input_ids: Tensor, weight: Tensor, patch_size: int) -> None:
    check_patch_size(patch_size)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (V, D), got {tuple(weight.shape)}")
    if input_ids.ndim == 0:
        raise ValueError("input_ids must have shape (..., T), got a scalar")
    check_class_dtype("input_ids", input_ids)
    check_float_dtype("weight", weight)
    if input_ids.device != weight.device:
        raise ValueError(f"input_ids is on {input_ids.device} but weight is on {weight.device}")


class _PatchEmbedding(Function):
    """Patch embedding with a table that this process holds whole."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int | None, backend: str) -> Tensor:
        return _forward(ids, weight, padding_idx, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None, str], output: Tensor) -> None:
        ids, weight, ctx.padding_idx, ctx.backend = inputs
        ctx.vocab = weight.shape[0]
        ctx.save_for_backward(ids)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return None, _backward(grad, ids, ctx.vocab, ctx.padding_idx, ctx.backend), None, None


class _TiedPatchEmbedding(Function):
    """The same, and the table for a head that shares it."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int | None, backend: str) -> tuple[Tensor, Tensor]:
        return _PatchEmbedding.forward(ids, weight, padding_idx, backend), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None, str], output: tuple[Tensor, Tensor]) -> None:
        _PatchEmbedding.setup_context(ctx, inputs, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, head_grad: Tensor | None) -> tuple[None, Tensor | None, None, None]:
        if grad is None:
            return None, head_grad, None, None
        (ids,) = ctx.saved_tensors
        if head_grad is not None and torch.compiler.is_compiling():
            head_grad = head_grad.clone(memory_format=torch.contiguous_format)  # left out where it is not needed
        elif head_grad is None or not is_owned(head_grad) or is_mapped(grad):
            own = _backward(grad, ids, ctx.vocab, ctx.padding_idx, ctx.backend)
            return None, own if head_grad is None else own + head_grad, None, None
        _add_gradient_(head_grad, grad, ids, ctx.padding_idx, ctx.backend)
        return None, head_grad, None, None


class _ShardedPatchEmbedding(Function):
    """Patch embedding with a table whose rows are sharded over processes.

    The lookup in the shard is PyTorch code in every backend; the gradient is the backend's.
    """

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int | None, shard: VocabShard, backend: str) -> Tensor:
        return _sharded_forward(ids, weight, padding_idx, *shard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, weight, ctx.padding_idx, ctx.shard, ctx.backend = inputs
        ctx.rows = len(weight)
        ctx.save_for_backward(ids)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        ids = ids.reshape(-1, ids.shape[-1])
        grad = grad.reshape(len(ids), grad.shape[-1])
        inside = _inside_shard(ids, ctx.rows, ctx.shard.first, ctx.padding_idx)
        # Tokens of other shards become padding: they get the id of an extra row. The operator divides by the number of
        # tokens that are not padding; the scale turns this into the number over the whole vocabulary.
        local_ids = torch.where(inside, ids - ctx.shard.first, ctx.rows)
        dtype = accumulation_dtype(grad.dtype)
        scaled = grad.to(dtype)
        if ids.shape[1] > 1:
            scaled = scaled * (inside.sum(1).to(dtype) * inverse_counts(ids, ctx.padding_idx, dtype)).unsqueeze(1)
        total = _backward(scaled, local_ids, ctx.rows + 1, ctx.rows, ctx.backend)[: ctx.rows]
        return None, total.to(grad.dtype), None, None, None


@operator("patch_embedding(Tensor ids, Tensor weight, SymInt? padding_idx, str backend) -> Tensor")
def _forward(
    ids: Tensor,  # (..., K)
    weight: Tensor,  # (V, D)
    padding_idx: int | None,
    backend: str,
) -> Tensor:  # (..., D)
    out: Tensor = implementation("patch_embedding", backend).forward(
        ids.reshape(-1, ids.shape[-1]), weight, padding_idx
    )
    return out.resize_(*ids.shape[:-1], weight.shape[1])  # a view could not be changed in place by the caller


@operator("patch_embedding_backward(Tensor grad, Tensor ids, SymInt vocab, SymInt? padding_idx, str backend) -> Tensor")
def _backward(
    grad: Tensor,  # (..., D)
    ids: Tensor,  # (..., K)
    vocab: int,
    padding_idx: int | None,
    backend: str,
) -> Tensor:  # (V, D)
    ids = ids.reshape(-1, ids.shape[-1])
    grad = grad.reshape(len(ids), grad.shape[-1])  # -1 could not be resolved at D = 0
    total: Tensor = implementation("patch_embedding", backend).backward(grad, ids, vocab, padding_idx)
    return total


@operator(
    "patch_embedding_add_gradient_(Tensor(a!) total, Tensor grad, Tensor ids, SymInt? padding_idx, str backend) -> ()"
)
def _add_gradient_(
    total: Tensor,  # (V, D), contiguous
    grad: Tensor,  # (..., D)
    ids: Tensor,  # (..., K)
    padding_idx: int | None,
    backend: str,
) -> None:
    ids = ids.reshape(-1, ids.shape[-1])
    grad = grad.reshape(len(ids), grad.shape[-1])
    implementation("patch_embedding", backend).add_gradient_(total, grad, ids, padding_idx)


@operator(
    "embedding_vocab_parallel(Tensor ids, Tensor weight, SymInt? padding_idx, SymInt first, SymInt vocab, str group) "
    "-> Tensor"
)
def _sharded_forward(
    ids: Tensor,  # (..., K), the same on all ranks
    weight: Tensor,  # (V_r, D)
    padding_idx: int | None,
    first: int,
    vocab: int,
    group: str,
) -> Tensor:  # (..., D), the same on all ranks
    check_ids(ids, vocab)
    *shape, patch_size = ids.shape
    ids = ids.reshape(-1, patch_size)
    dtype = accumulation_dtype(weight.dtype)
    # Sums start at -0.0: adding 0.0 would turn an embedding of -0.0 into 0.0, and K = 1 must be exact to the bit.
    total = torch.full((len(ids), weight.shape[1]), -0.0, dtype=dtype, device=weight.device)
    if len(weight):
        # at K = 1 the padding row is read like any other, as in F.embedding
        inside = _inside_shard(ids, len(weight), first, padding_idx if patch_size > 1 else None)
        for slot, in_shard in zip(ids.T, inside.T):  # slot by slot, so that no tensor has the shape (N K, D)
            rows = weight[(slot - first).clamp(0, len(weight) - 1)]
            total += rows.masked_fill_(~in_shard.unsqueeze(1), -0.0)
    sum_(total, group)
    if patch_size > 1:
        total *= inverse_counts(ids, padding_idx, dtype).unsqueeze(1)
    bad = ((ids < 0) | (ids >= vocab)).any(1, keepdim=True)
    out = total.masked_fill_(bad, torch.nan).to(weight.dtype)
    return out.resize_(*shape, weight.shape[1])  # not a view, as in _forward


def _inside_shard(ids: Tensor, rows: int, first: int, padding_idx: int | None) -> Tensor:
    """True for the ids whose rows are in this shard, padding excepted."""
    inside = (ids >= first) & (ids < first + rows)
    return inside if padding_idx is None else inside & (ids != padding_idx)


@fake("patch_embedding", "embedding_vocab_parallel")
def _(ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(*ids.shape[:-1], weight.shape[1])


@fake("patch_embedding_add_gradient_")
def _(*_: Any) -> None:
    return


@fake("patch_embedding_backward")
def _(grad: Tensor, ids: Tensor, vocab: int, *_: Any) -> Tensor:
    return grad.new_empty(vocab, grad.shape[-1])
