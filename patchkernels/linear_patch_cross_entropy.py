"""Operator 2 with the head fused in: K-token cross entropy of ``input @ linear_weight.T``, logits never kept.

Rows are taken in chunks whose logits fit a byte budget. A chunk is three matrix products and one pass over its
logits, which turns them into loss and dlogits in place:

    z = x W^T;   z -> l, dz;   dx = dz W;   dW += dz^T x   (fp32, cast once)

The gradients are formed in the forward, where they are needed and the reduction is a scalar, and scaled out of
place by the upstream gradient in the backward; ``reduction="none"`` forms them in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import patchkernels.linear_vocab_parallel  # noqa: F401  (registers its operator)
from patchkernels import backend as _backend
from patchkernels.flops import register_flops
from patchkernels.linear_low_memory import low_memory_losses
from patchkernels.linear_parts import (
    LOGITS_BYTES,
    LOGITS_BYTES_LOSS_ONLY,
    add_product,
    chunk_rows,
    linear_flops,
    linear_outputs,
    logits_buffer,
    unit_scale,
    without_autocast,
)
from patchkernels.parallel import VocabShard, is_dtensor, like, replicated, vocab_shard
from patchkernels.patch_cross_entropy import (
    LossOptions,
    check_arguments,
    check_range,
    reduce_losses,
    softmax_,
    softmax_to_gradient_,
    weigh_targets,
)
from patchkernels.patch_embedding import accumulation_dtype

MEMORIES = ("default", "low")


def linear_patch_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (..., K), or (...) for K = 1
    *,
    linear_bias: Tensor | None = None,  # (V)
    target_weight: Tensor | None = None,  # (K) or (..., K)
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
    memory: str = "default",
    logits_bytes: int | None = None,
    return_losses: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Any:
    r"""``patch_cross_entropy(input @ linear_weight.T + linear_bias, target, ...)`` without keeping the logits.

    Argument names follow ``torch.nn.functional.linear_cross_entropy``; the loss and its options are those of
    :func:`patch_cross_entropy`. Three matrix products in all where gradients of a scalar loss are needed, one
    otherwise; their cost does not depend on K.

    Args:
        input: hidden states, shape ``(..., D)``; float32, bfloat16, float16 (float64 too on the eager path).
        linear_weight: the head, shape ``(V, D)``, the dtype of ``input``. Under ``torch.autocast`` both are cast
            to autocast's dtype, as ``F.linear`` does.
        target: class indices, shape ``(..., K)``, or ``(...)`` for K = 1.
        linear_bias: shape ``(V,)``.
        memory: ``"default"``, or ``"low"``: the logits exist in vocabulary slices only, dW in no other dtype than its
            own, for one more matrix product (four). See :mod:`patchkernels.linear_low_memory`.
        logits_bytes: the memory that logits may take at a time; by default ``LOGITS_BYTES`` of the device, and for
            ``memory="low"`` 1/128 of ``2 N V`` bytes, or 1 MiB where that is more.
        return_losses: also what was reduced, at no further cost: ``(loss, losses)``, the latter without gradient,
            unweighted, in the shape of ``target``, 0 where that is ignored.

        process_group: the head is sharded by its rows (vocabulary parallel): every process gives its own classes, shape
            ``(V_r, D)``, in the order of ranks and as many as it has, and the same input and targets, which are classes
            of the whole vocabulary. Loss and ``dx`` are the same on all processes. A head that is a DTensor of
            placements ``Shard(0)`` says so itself (under torch.compile it must be one). See
            :mod:`patchkernels.linear_vocab_parallel`.

    Returns:
        a scalar, or the shape of ``target`` for ``reduction="none"``; fp32 (fp64 for fp64 input). Peak extra memory
        is the logits budget, plus ``4 V D`` bytes for dW in fp32 where the head needs a gradient; for
        ``memory="low"`` the logits budget, plus ``4 N D`` bytes where the input is of 16 bits and needs a gradient.

    Raises:
        ValueError, TypeError, IndexError: as :func:`patch_cross_entropy`; ValueError too for a head or bias whose
            shape, dtype or device does not fit the input.
    """
    if linear_weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"linear_weight must have shape (V, D) for an input of shape (..., D): got {tuple(linear_weight.shape)} "
            f"for input {tuple(input.shape)}"
        )
    given = input
    input, target = replicated(input, "input"), replicated(target, "target")
    linear_weight, shard = vocab_shard(linear_weight, process_group, "linear_weight")
    if linear_bias is not None and is_dtensor(linear_bias):
        linear_bias = vocab_shard(linear_bias, None, "linear_bias")[0]
    vocab, hidden = (shard.vocab if shard else len(linear_weight)), linear_weight.shape[1]
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    check_arguments(input, target, vocab, options, "hidden states (..., D)")
    if linear_bias is not None and linear_bias.shape != (len(linear_weight),):
        raise ValueError(f"linear_bias must have shape ({len(linear_weight)},), got {tuple(linear_bias.shape)}")
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {MEMORIES}, got {memory!r}")
    if shard and memory == "low":
        raise ValueError("memory='low' is for a head that one process holds; a sharded one takes memory='default'")
    if logits_bytes is not None and logits_bytes < 1:
        raise ValueError(f"logits_bytes must be positive, got {logits_bytes}")
    device = input.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # meta tensors know no autocast
    if autocast and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            raise ValueError(
                f"{name} must have the dtype and device of input ({input.dtype} on {input.device}), "
                f"got {tensor.dtype} on {tensor.device}"
            )
    x = input.reshape(-1, hidden)
    rows, coefficient = weigh_targets(input, target, target_weight, ignore_index, reduction)
    engine = _backend.resolve(backend, input)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    if memory == "low":
        losses = low_memory_losses(x, linear_weight, linear_bias, rows, needs, options, logits_bytes, engine)
        loss = reduce_losses(losses, coefficient, target.shape, reduction)
        return (loss, losses.detach().view(target.shape)) if return_losses else like(loss, given)
    budgets = LOGITS_BYTES if any(needs) and reduction != "none" else LOGITS_BYTES_LOSS_ONLY
    budget = logits_bytes or budgets.get(device, budgets["cuda"])
    if reduction == "none" or not any(needs):
        losses = _LinearLosses.apply(x, linear_weight, linear_bias, rows, needs, options, shard, budget, engine)
        loss = reduce_losses(losses, coefficient, target.shape, reduction)
    else:
        arguments = (x, linear_weight, linear_bias, rows, coefficient, needs, options, shard, budget, engine)
        loss, losses, *_ = _LinearLoss.apply(*arguments)
    loss = like(loss, given)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


class _LinearLoss(torch.autograd.Function):
    """``sum c l`` for a given matrix c, gradients formed in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        c: Tensor,
        needs: list[bool],
        options: LossOptions,
        shard: VocabShard | None,
        budget: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        scale, unit = unit_scale(c)
        losses, *grads = _linear_op(x, weight, bias, target, unit, needs, options, shard, budget, backend)
        return (losses * c).sum(), losses, scale, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs = inputs[5]
        ctx.dtype = inputs[0].dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        scale, *grads = ctx.saved_tensors
        return *_scale_gradients(grads, grad * scale, ctx.needs, ctx.dtype), *(None,) * 7


class _LinearLosses(torch.autograd.Function):
    """``l (N, K)``; the backward recomputes the logits, since it is told c only then."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        needs: list[bool],
        options: LossOptions,
        shard: VocabShard | None,
        budget: int,
        backend: str,
    ) -> Tensor:
        return _linear_op(x, weight, bias, target, None, [False] * 3, options, shard, budget, backend)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, target, ctx.needs, ctx.options, ctx.shard, ctx.budget, ctx.backend = inputs
        ctx.save_for_backward(x, weight, bias, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target = ctx.saved_tensors
        scale, unit = unit_scale(grad)
        given = (ctx.needs, ctx.options, ctx.shard, ctx.budget, ctx.backend)
        _, *grads = _linear_op(x, weight, bias, target, unit, *given)
        return *_scale_gradients(grads, scale, ctx.needs, x.dtype), *(None,) * 6


def _scale_gradients(grads: list[Tensor], scale: Tensor, needs: list[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """Out of place, so that a second backward finds them as they were; the one cast of dW happens here."""
    return [(g * scale).to(dtype) if needed else None for g, needed in zip(grads, needs, strict=True)]


def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    c: Tensor | None,
    needs: list[bool],
    options: LossOptions,
    shard: VocabShard | None,
    budget: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops = torch.ops.patchkernels
    op = ops.linear_vocab_parallel if shard else ops.linear_patch_cross_entropy
    out: tuple[Tensor, Tensor, Tensor, Tensor] = op(
        x, weight, bias, target, c, needs, *(shard or ()), *options, budget, backend
    )
    return out


@torch.library.custom_op("patchkernels::linear_patch_cross_entropy", mutates_args=())
@without_autocast
def _linear(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: losses only
    needs: list[bool],  # gradients of x, weight, bias
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    logits_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # l (N, K), dx (N, D), dW (V, D) and db (V) in fp32; empty if not needed
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    losses, dx, dw, db = linear_outputs(x, weight, target, c, needs)
    dw.zero_(), db.zero_()
    if backend == "eager":
        check_range(target, len(weight), ignore_index)
    chunk = chunk_rows(len(x), len(weight) * x.element_size(), logits_bytes)
    buffer = logits_buffer(min(chunk, len(x)), weight, backend)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        z = buffer[: len(x[rows])]
        torch.mm(x[rows], weight.T, out=z) if bias is None else torch.addmm(bias, x[rows], weight.T, out=z)
        dz = _losses_and_dlogits(z, target[rows], None if c is None else c[rows], losses[rows], options, backend)
        if dz is None:
            continue
        if needs[0]:
            torch.mm(dz.to(x.dtype), weight, out=dx[rows])
        if needs[1]:
            add_product(dw, dz.T, x[rows])
        if needs[2]:
            db += dz.sum(0, dtype=db.dtype)
    return losses, dx, dw, db


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    c: Tensor | None,
    needs: list[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    logits_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_outputs(x, weight, target, c, needs)


register_flops(torch.ops.patchkernels.linear_patch_cross_entropy, linear_flops)


def _losses_and_dlogits(
    z: Tensor, target: Tensor, c: Tensor | None, losses: Tensor, options: LossOptions, backend: str
) -> Tensor | None:
    """Fills ``losses``; the logits ``z``, our own buffer, become dlogits. None where no gradient is wanted."""
    if backend == "triton":
        from patchkernels.kernels import cross_entropy as kernels

        kernels.loss_and_gradient_(z, target, c, losses, options)
        return None if c is None else z
    p = z.to(accumulation_dtype(z.dtype))
    losses[:], lse, slope = softmax_(p, target, options)
    return None if c is None else softmax_to_gradient_(p, target, c, lse, slope, options)
