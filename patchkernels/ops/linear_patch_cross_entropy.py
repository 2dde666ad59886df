"""The fused loss: K-token cross entropy of ``input @ linear_weight.T`` without keeping the logits.

This file holds the contract and autograd. The arithmetic is in :mod:`patchkernels.ops.linear_row_chunks`, in
:mod:`patchkernels.ops.linear_vocab_shards` for a head in shards, and in :mod:`patchkernels.ops.linear_vocab_slices` for
``memory="low"``.

If the loss is a scalar and gradients are needed, the forward computes them, and the backward only scales them by the
upstream gradient, out of place. With ``reduction="none"`` or ``memory="low"`` the backward computes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Importing these two modules registers their operators.
import patchkernels.ops.linear_row_chunks
import patchkernels.ops.linear_vocab_shards  # noqa: F401
from patchkernels.numerics import IGNORE_INDEX, LossOptions, check_float_dtype
from patchkernels.ops.backend import choose_backend
from patchkernels.ops.derivatives import Function, check_transforms, first_derivative_only, transforms
from patchkernels.ops.linear_buffers import LOGITS_BYTES, LOGITS_BYTES_LOSS_ONLY, power_of_two_scale
from patchkernels.ops.linear_vocab_slices import vocab_slice_losses
from patchkernels.ops.targets import check_loss_arguments, reduce_losses, weigh_losses, weigh_targets
from patchkernels.ops.vocab_shard import VocabShard, as_replicated, replicated, vocab_shard

MEMORIES = ("default", "low")


def linear_patch_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (..., K), or (...) for K = 1
    *,
    linear_bias: Tensor | None = None,  # (V)
    target_weight: Tensor | None = None,  # (K) or (..., K)
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
    memory: str = "default",
    logits_bytes: int | None = None,
    return_losses: bool = False,
    backend: str = "auto",
) -> Any:
    r"""``patch_cross_entropy(input @ linear_weight.T + linear_bias, target, ...)`` without keeping the logits.

    Argument names follow ``torch.nn.functional.linear_cross_entropy``; the loss and its options are those of
    :func:`patch_cross_entropy`. It takes three matrix products in all if gradients of a scalar loss are needed, four
    for those of ``reduction="none"``, and one without gradients. Their cost does not depend on K.

    Args:
        input: hidden states, shape ``(..., D)``; float32, bfloat16, float16 (float64 too in the eager backend).
        linear_weight: the head, shape ``(V, D)``, the dtype of ``input``. Under ``torch.autocast`` both are cast
            to autocast's dtype, as ``F.linear`` does. A DTensor of placements ``Shard(0)`` is a head sharded by its
            rows (vocabulary parallel). ``input`` is then a replicated DTensor on the same mesh, every process passes
            the same targets as classes of the whole vocabulary, and the loss is a replicated DTensor too.
        target: class indices, shape ``(..., K)``, or ``(...)`` for K = 1.
        linear_bias: shape ``(V,)``, sharded as the head is.
        target_weight, ignore_index, reduction, label_smoothing, softcap, z_loss_weight: as in
            :func:`patch_cross_entropy`. Hidden states must be finite, also those of ignored targets. In float16, logits
            beyond 65504 overflow as those of ``F.linear`` do, and so does the gradient of ``input`` where
            ``2 z_loss_weight lse`` is beyond 32000.
        memory: ``"default"``, or ``"low"``, which takes four matrix products: only a slice of the vocabulary has
            logits at a time, and the head's gradient has no copy in another dtype (in fp16 a slice of it has).
        logits_bytes: the memory that logits may take at a time. By default it is ``LOGITS_BYTES`` of the device if the
            forward computes gradients and ``LOGITS_BYTES_LOSS_ONLY`` if not; for ``memory="low"`` it is 1/128 of
            ``2 N V`` bytes, or 1 MiB if that is more.
        return_losses: returns ``(loss, losses)``, at no further cost. ``losses`` are those before weighting and
            reduction, without gradient, in the shape of ``target``; 0 for ignored targets, as in
            :func:`patch_cross_entropy`.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        a scalar, or the shape of ``target`` for ``reduction="none"``; fp32 (fp64 for fp64 input). Peak extra memory
        is ``logits_bytes``, plus ``4 V D`` bytes for dW in fp32 if the head needs a gradient; for ``memory="low"`` it
        is ``logits_bytes``, plus ``4 N D`` bytes if the input has 16 bits and needs a gradient.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError, IndexError: as :func:`patch_cross_entropy`; also
            ValueError for a head or bias whose shape, dtype, device or placements do not fit the input, and for an
            unknown ``memory``.
    """
    check_transforms("linear_patch_cross_entropy", input, linear_weight, linear_bias)
    if linear_weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"linear_weight must have shape (V, D) for an input of shape (..., D): got {tuple(linear_weight.shape)} "
            f"for input {tuple(input.shape)}"
        )
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    x, target = replicated(input, "input"), replicated(target, "target")
    weight, shard = vocab_shard(linear_weight, "linear_weight", input, "input")
    bias = linear_bias
    if bias is not None:
        bias, _ = vocab_shard(bias, "linear_bias", linear_weight, "linear_weight")
    vocab = shard.vocab if shard else len(weight)
    check_loss_arguments(x, target, vocab, options, "hidden states (..., D)")
    check_float_dtype("linear_weight", weight)
    if bias is not None:
        check_float_dtype("linear_bias", bias)
    _check_settings(weight, bias, memory, logits_bytes, shard)
    x, weight, bias = _as_autocast(x, weight, bias)
    _check_dtypes_and_devices(x, weight, bias)
    backend = choose_backend(backend, x)
    row_targets, c = weigh_targets(x, target, target_weight, ignore_index, reduction, return_losses)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    rows = x.reshape(row_targets.shape[0], x.shape[-1])  # -1 could not be resolved at D = 0
    # Gradients that the forward computes do not depend on the input for autograd, and in transforms they should.
    gradients_in_forward = memory == "default" and reduction != "none" and any(needs) and not transforms()
    budgets = LOGITS_BYTES if gradients_in_forward else LOGITS_BYTES_LOSS_ONLY
    call = _Call(needs, options, shard, logits_bytes or budgets.get(x.device.type, budgets["cuda"]), backend)
    if gradients_in_forward:
        loss, losses, *_ = _LinearLoss.apply(rows, weight, bias, row_targets, c, call)
    else:
        if memory == "low":
            losses = vocab_slice_losses(rows, weight, bias, row_targets, needs, options, logits_bytes, backend)
        else:
            losses = _LinearLosses.apply(rows, weight, bias, row_targets, call)
        loss = reduce_losses(losses, c, target.shape, reduction)
    loss = as_replicated(loss, input)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


def _check_settings(
    weight: Tensor, bias: Tensor | None, memory: str, logits_bytes: int | None, shard: VocabShard | None
) -> None:
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"linear_bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {MEMORIES}, got {memory!r}")
    if shard and memory == "low":
        raise ValueError("memory='low' is for a head that one process holds; a sharded one takes memory='default'")
    if logits_bytes is not None and logits_bytes < 1:
        raise ValueError(f"logits_bytes must be positive, got {logits_bytes}")


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts the tensors as ``F.linear`` does under autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # meta has no autocast
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_dtypes_and_devices(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have the dtype and device of input ({x.dtype} on {x.device}), "
                f"got {tensor.dtype} on {tensor.device}"
            )


class _Call(NamedTuple):
    """The settings of one call of the fused loss."""

    needs: list[bool]  # gradients of x, weight, bias
    options: LossOptions
    shard: VocabShard | None
    logits_bytes: int
    backend: str

    def losses_and_gradients(
        self,
        x: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V)
        target: Tensor,  # (N, K)
        c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    ) -> tuple[Tensor, ...]:  # l, dx, dW, db
        ops = torch.ops.patchkernels
        op = ops.linear_vocab_parallel if self.shard else ops.linear_patch_cross_entropy
        settings = (*(self.shard or ()), self.logits_bytes, self.backend, *self.options)
        results: tuple[Tensor, ...] = op(x, weight, bias, target, c, self.needs, *settings)
        return results


class _LinearLoss(Function):
    """The weighted sum ``sum c l``. The forward computes its gradients, and the backward only scales them."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, c: Tensor, call: _Call
    ) -> tuple[Tensor, ...]:
        scale, scaled_c = power_of_two_scale(c)
        losses, *grads = call.losses_and_gradients(x, weight, bias, target, scaled_c)
        return weigh_losses(losses, c).sum(), losses, scale, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _, ctx.call = inputs
        _, losses, *saved = output
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, *saved)
        ctx.save_for_backward(*saved, x, weight, bias)  # the last three for first_derivative_only

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        scale, *grads = ctx.saved_tensors[:4]
        return *_scale_gradients(grads, grad * scale, ctx.call.needs, ctx.dtype), None, None, None


class _LinearLosses(Function):
    """The losses of all targets, ``l (N, K)``.

    ``c``, the gradient with respect to them, is known only in the backward, which therefore computes the logits again.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: _Call) -> Tensor:
        return call._replace(needs=[False] * 3).losses_and_gradients(x, weight, bias, target, None)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target = ctx.saved_tensors
        scale, c = power_of_two_scale(grad)
        _, *grads = ctx.call.losses_and_gradients(x, weight, bias, target, c)
        return *_scale_gradients(grads, scale, ctx.call.needs, x.dtype), None, None


def _scale_gradients(grads: list[Tensor], scale: Tensor, needs: list[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """The gradients times ``scale``, in the dtype of the parameters.

    They are not changed in place, because a second backward needs them again. The product is taken in the dtype of the
    scale: a GPU would round a scale of no dimensions to the dtype of the gradient, in fp16 to infinity.
    """
    return [(g.to(scale.dtype) * scale).to(dtype) if needed else None for g, needed in zip(grads, needs, strict=True)]
