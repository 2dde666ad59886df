"""The fused loss: K-token cross entropy of ``input @ linear_weight.T`` without keeping the logits.

This file holds the contract and autograd. The arithmetic is in :mod:`patchkernels.ops.linear_row_chunks`, and in
:mod:`patchkernels.ops.linear_vocab_slices` for ``memory="low"``.

If the loss is a scalar and its logits fit the budget, they become dlogits in the forward, which are kept for the
backward. If they do not fit, the forward computes the gradients chunk by chunk, and the backward scales them, out of
place. With ``reduction="none"`` or ``memory="low"`` the backward computes the logits again.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchkernels.numerics import IGNORE_INDEX, LossOptions, check_float_dtype
from patchkernels.ops.backend import choose_backend
from patchkernels.ops.derivatives import Function, check_transforms, first_derivative_only, transforms
from patchkernels.ops.linear_buffers import (
    LOGITS_BYTES,
    LOGITS_BYTES_LOSS_ONLY,
    known_to_be_true,
    power_of_two_scale,
)
from patchkernels.ops.linear_row_chunks import linear_gradients, linear_loss, linear_losses
from patchkernels.ops.linear_vocab_slices import vocab_slice_losses
from patchkernels.ops.targets import as_rows, check_loss_arguments, check_target_weight, reduce_losses, weigh_rows
from patchkernels.ops.tied import is_tied, mark_owned
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
            ``2 N V`` bytes, or if that is more 1 MiB, and on a GPU 2048 classes.
        return_losses: returns ``(loss, losses)``, at no further cost. ``losses`` are those before weighting and
            reduction, without gradient, in the shape of ``target``; 0 for ignored targets, as in
            :func:`patch_cross_entropy`.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        a scalar, or the shape of ``target`` for ``reduction="none"``; fp32 (fp64 for fp64 input).

    Memory beyond results: the logits, which are kept until the backward, and under autocast the input and the head in
    16 bits. Logits that do not fit ``logits_bytes`` take that much, and then a head that needs a gradient takes
    ``4 V D`` bytes for dW in fp32 (so does one in fp16). ``memory="low"`` takes ``logits_bytes``, plus ``4 N D`` bytes
    if the input has 16 bits and needs a gradient.

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
    check_target_weight(x, target, target_weight, reduction)
    dtype = _dtype_of_products(x, weight, bias)
    backend = choose_backend(backend, x, dtype)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    row_targets, row_weight = as_rows(x, target, target_weight)
    rows = x.reshape(row_targets.shape[0], x.shape[-1])  # -1 could not be resolved at D = 0
    budgets = LOGITS_BYTES if memory == "default" and reduction != "none" and any(needs) else LOGITS_BYTES_LOSS_ONLY
    budget = logits_bytes or budgets.get(x.device.type, budgets["cuda"])
    call = _Call(needs, options, shard or VocabShard(0, vocab, ""), budget, backend)
    # What the forward keeps does not depend on the input for autograd, and in transforms it should.
    if memory == "default" and reduction != "none" and not (any(needs) and transforms()):
        keep = any(needs) and call.one_chunk(rows, linear_weight, dtype)
        reduced = (row_targets, row_weight, reduction, return_losses, keep)
        loss, losses = _scalar_loss(rows, weight, bias, dtype, call, *reduced)
    else:
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        row_targets, c = weigh_rows(row_targets, row_weight, ignore_index, reduction, return_losses, dtype)
        if memory == "low":
            losses = vocab_slice_losses(rows, weight, bias, row_targets, needs, options, logits_bytes, backend)
        else:
            losses = _LinearLosses.apply(rows, weight, bias, row_targets, call)
        loss = reduce_losses(losses, c, target.shape, reduction)
    loss = as_replicated(loss, input)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


def _check_settings(
    weight: Tensor, bias: Tensor | None, memory: str, logits_bytes: Any, shard: VocabShard | None
) -> None:
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"linear_bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {MEMORIES}, got {memory!r}")
    if shard and memory == "low":
        raise ValueError("memory='low' is for a head that one process holds; a sharded one takes memory='default'")
    if logits_bytes is not None and not isinstance(logits_bytes, numbers.Integral | torch.SymInt):
        raise TypeError(f"logits_bytes must be an integer, got {logits_bytes!r}")
    if logits_bytes is not None and logits_bytes < 1:
        raise ValueError(f"logits_bytes must be positive, got {logits_bytes}")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast turns the arguments of ``F.linear(x, ...)``; None if it leaves them."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # meta has no autocast
        return None
    return torch.get_autocast_dtype(device)


def _dtype_of_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """That of autocast, or else the one that all three have. Raises ``ValueError`` if they do not fit together."""
    autocast = _autocast_dtype(x)
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and (tensor.device != x.device or (tensor.dtype != x.dtype and autocast is None)):
            raise ValueError(
                f"{name} must have the dtype and device of input ({x.dtype} on {x.device}), "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return autocast or x.dtype


class _Call(NamedTuple):
    """The settings of one call of the fused loss."""

    needs: list[bool]  # gradients of x, weight, bias
    options: LossOptions
    shard: VocabShard  # of an empty group: the whole vocabulary
    logits_bytes: int
    backend: str

    @property
    def settings(self) -> tuple[Any, ...]:
        return *self.shard, self.logits_bytes, self.backend, *self.options

    def one_chunk(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether the logits of all rows fit the budget.

        ``weight`` may be a DTensor, whose first shard is the largest.
        """
        columns = len(weight)
        if self.shard.group:
            columns = -(-columns // weight.device_mesh.size())  # type: ignore[attr-defined]
        return known_to_be_true(len(x) * columns * dtype.itemsize <= self.logits_bytes)

    def loss(self, *arguments: Any) -> tuple[Tensor, ...]:
        return linear_loss(*arguments, *self.settings)

    def losses_and_gradients(
        self,
        x: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V)
        target: Tensor,  # (N, K)
        c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    ) -> tuple[Tensor, ...]:  # l, dx, dW, db
        return linear_losses(x, weight, bias, target, c, self.needs, *self.settings)


def _scalar_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, call: _Call, *reduced: Any
) -> tuple[Tensor, Tensor]:  # the loss (), l (N, K) without gradient
    computed = [None if t is None else t.detach().to(dtype) for t in (x, weight, bias)]
    function: Any = _LinearLoss.apply if any(call.needs) else _LinearLoss.forward
    loss, losses, *_ = function(x, weight, bias, *computed, call, *reduced)
    return loss, losses


class _LinearLoss(Function):
    """The weighted sum ``sum c l``.

    ``x``, ``weight`` and ``bias`` are for autograd. What is computed with are the same three without a gradient, in the
    dtype of autocast: gradients have the dtypes of the former, without a cast of their own.
    """

    @staticmethod
    def forward(
        x: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V)
        cast_x: Tensor,
        cast_weight: Tensor,
        cast_bias: Tensor | None,
        call: _Call,
        target: Tensor,  # (N, K)
        target_weight: Tensor | None,  # (K) or (N, K)
        reduction: str,
        every_loss: bool,
        keep: bool,  # dlogits for the backward, instead of gradients
    ) -> tuple[Tensor, ...]:
        tensors = (cast_x, cast_weight, cast_bias, target, target_weight)
        return call.loss(*tensors, reduction, every_loss, call.needs, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, cast_x, cast_weight, _, ctx.call, *_, keep = inputs
        _, *saved = output
        ctx.dtypes = [x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
        ctx.tied = is_tied(weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        factors = (cast_x, cast_weight) if keep else (None, None)
        ctx.save_for_backward(*saved[1:], *factors, x, weight, bias)  # the last three for first_derivative_only

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        call, kept = ctx.call, ctx.saved_tensors[:7]
        gradients = linear_gradients(grad, *kept, call.needs, call.shard.group, call.backend, *ctx.dtypes)
        if ctx.tied:
            mark_owned(gradients[1])
        return *(g if needed else None for g, needed in zip(gradients, call.needs)), *(None,) * 9


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
        ctx.tied = is_tied(tensors[1])
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target = ctx.saved_tensors
        call = ctx.call
        scale, c = power_of_two_scale(grad)
        _, dx, dw, db = call.losses_and_gradients(x, weight, bias, target, c)
        no_scale, no_dlogits = scale.new_empty(0), x.new_empty(0)
        settings = (call.needs, call.shard.group, call.backend, *[x.dtype] * 3)
        gradients = linear_gradients(scale, no_scale, no_dlogits, dx, dw, db, None, None, *settings)
        if ctx.tied:
            mark_owned(gradients[1])
        return *(g if needed else None for g, needed in zip(gradients, call.needs)), None, None
