"""K-token cross entropy: one row of logits predicts K tokens.

    loss[n, k] = w[n, k] (lse_n - z[n, t_nk])
    dz[n, :]   = (sum_k c_nk) softmax(z_n) - sum_k c_nk onehot(t_nk),     c = upstream * w / normaliser

Ignored labels, weights, overlapping or repeated targets and every reduction are expressed by the matrix ``c`` of shape
(N, K), so that the work of size V is done once per row, whatever K is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import IGNORE_INDEX, LOSS_OPTIONS, LossOptions, accumulation_dtype
from patchkernels.ops.backend import choose_backend, implementation
from patchkernels.ops.derivatives import Function, check_transforms, first_derivative_only, is_mapped, transforms
from patchkernels.ops.registration import fake, operator
from patchkernels.ops.targets import as_rows, check_loss_arguments, check_target_weight, reduce_losses, weigh_rows


def patch_cross_entropy(
    input: Tensor,  # logits (..., V)
    target: Tensor,  # (..., K), or (...) for K = 1
    *,
    target_weight: Tensor | None = None,  # (K) or (..., K)
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
    return_losses: bool = False,
    backend: str = "auto",
) -> Any:
    r"""``loss[n, k] = w[n, k] * (lse_n - z[n, t_nk])``, then reduced: one row of logits predicts K tokens.

    At K = 1 this is ``F.cross_entropy`` (PatchTrain, arXiv 2407.12665, section 2; TST, arXiv 2605.06546).

    Args:
        input: logits, shape ``(..., V)`` with V at least 1; float32, bfloat16, float16 (float64 too in the eager
            backend). Never overwritten. Statistics are taken in fp32.
        target: class indices, shape ``(..., K)``, or ``(...)`` for K = 1; int32 or int64.
        target_weight: shape ``(K,)`` or that of ``target``; a constant (no gradient). It may be negative. A target of
            weight 0 adds nothing to the loss or the gradient, even if its logits are NaN.
        ignore_index: targets of this value have weight 0; a number of the dtype of ``target``.
        reduction: ``"mean"``: ``sum w l / sum w`` over all valid targets; ``"slot_mean"`` (both papers): for each
            slot k the mean over the rows whose k-th target is valid, then the mean over slots, weighted by a ``(K,)``
            ``target_weight``, without slots that have no valid target; ``"sum"``; ``"none"``: weighted, in the shape of
            ``target``. If every target is ignored, both means are 0 with zero gradients (``F.cross_entropy`` gives
            NaN), and likewise if every weight is 0. Weights that sum to 0 without being 0 have no mean: the loss is
            infinite or NaN, as in ``F.cross_entropy``.
        label_smoothing: in [0, 1]; ``e`` in ``l = (1-e) (lse - z_t) + e (lse - mean_v z_v)``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first; from 1e-30 to 1e30.
        z_loss_weight: adds ``z_loss_weight * lse^2`` to each ``l``; finite, at least 0.
        return_losses: returns ``(loss, losses)``. ``losses`` are the ``l`` before weighting and reduction, without
            gradient, in the shape of ``target``; 0 for ignored targets. Targets of weight 0 have theirs too, for which
            rows are read that are skipped otherwise.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        a scalar, or the shape of ``target`` for ``reduction="none"``; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes or devices that do not fit, an unknown reduction, an option out of its range.
        TypeError: dtypes other than those above.
        RuntimeError: a backend that cannot run (Triton's does not take float64); a gradient of a gradient.
        NotImplementedError: a call under ``torch.func.vmap`` or with forward-mode tangents (``jvp``, ``jacfwd``).
        IndexError: a target outside [0, V) that is not ``ignore_index``, on a CPU. On a GPU, where raising would
            cost a synchronisation, that target's loss is NaN and no memory out of bounds is read.
    """
    check_transforms("patch_cross_entropy", input)
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    check_loss_arguments(input, target, input.shape[-1] if input.ndim else 0, options, "logits (..., V)")
    check_target_weight(input, target, target_weight, reduction)
    logits = input.reshape(-1, input.shape[-1])
    backend = choose_backend(backend, input, input.dtype)
    rows = as_rows(input, target, target_weight)
    if reduction != "none" and _gradient_in_forward(input):
        loss, losses, _ = _ReducedCrossEntropy.apply(logits, *rows, reduction, return_losses, options, backend)
    else:
        row_targets, c = weigh_rows(*rows, ignore_index, reduction, return_losses, input.dtype)
        losses, _ = _PatchCrossEntropy.apply(logits, row_targets, options, backend)
        loss = reduce_losses(losses, c, target.shape, reduction)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


def _gradient_in_forward(logits: Tensor) -> bool:
    """Whether the forward computes dlogits, which saves a reading of the logits.

    Not for fp16, in which dlogits must be multiplied by the upstream gradient before they are rounded. torch.compile
    would copy dlogits to scale them, and transforms need a backward that depends on the logits.
    """
    needed = torch.is_grad_enabled() and logits.requires_grad and logits.dtype != torch.float16
    return needed and not torch.compiler.is_compiling() and not transforms()


class _ReducedCrossEntropy(Function):
    """The weighted sum ``sum c l``. The forward computes dlogits, and the backward scales them.

    It does so in place where autograd frees them afterwards: on a GPU, to multiply by 1 then costs nothing. The dlogits
    take the memory of the logits from the forward on.
    """

    @staticmethod
    def forward(
        logits: Tensor,  # (N, V)
        target: Tensor,  # (N, K)
        target_weight: Tensor | None,  # (K) or (N, K)
        reduction: str,
        every_loss: bool,
        options: LossOptions,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _reduced(logits, target, target_weight, reduction, every_loss, backend, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, *_, ctx.backend = inputs
        _, losses, dlogits = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, dlogits)
        ctx.save_for_backward(dlogits, logits)  # the latter for first_derivative_only

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        dlogits, _ = ctx.saved_tensors
        if is_mapped(grad) or torch._C._autograd._get_current_graph_task_keep_graph():
            return _scaled(dlogits, grad, ctx.backend), *(None,) * 6
        _scale_(dlogits, grad, ctx.backend)
        return dlogits, *(None,) * 6


class _PatchCrossEntropy(Function):
    """Maps logits and targets to ``l (N, K)`` and statistics ``(2, N)``; the backward reads the logits once more."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor, options: LossOptions, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(logits, target, backend, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, LossOptions, str], output: tuple[Tensor, Tensor]) -> None:
        logits, target, ctx.options, ctx.backend = inputs
        _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(logits, target, statistics)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(grad, *ctx.saved_tensors, ctx.backend, *ctx.options), None, None, None


@operator(f"patch_cross_entropy(Tensor logits, Tensor target, str backend, {LOSS_OPTIONS}) -> (Tensor, Tensor)")
def _forward(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor]:  # l (N, K); max z and sum exp(z - max) (2, N)
    options, cross_entropy = LossOptions(*loss_options), implementation("cross_entropy", backend)
    cross_entropy.check_targets(target, logits.shape[1], options.ignore_index)
    losses, statistics = cross_entropy.loss(logits, target, options)
    return losses, statistics


@operator(
    "patch_cross_entropy_backward(Tensor c, Tensor logits, Tensor target, Tensor statistics, str backend, "
    f"{LOSS_OPTIONS}) -> Tensor"
)
def _backward(
    c: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (2, N): max z, sum exp(z - max)
    backend: str,
    *loss_options: Any,
) -> Tensor:  # (N, V)
    cross_entropy = implementation("cross_entropy", backend)
    dlogits: Tensor = cross_entropy.logits_gradient(c, logits, target, statistics, LossOptions(*loss_options))
    return dlogits


@operator(
    "patch_cross_entropy_reduced(Tensor logits, Tensor target, Tensor? target_weight, str reduction, bool every_loss, "
    f"str backend, {LOSS_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
def _reduced(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    target_weight: Tensor | None,  # (K) or (N, K)
    reduction: str,
    every_loss: bool,  # also of targets of weight 0
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # loss (), l (N, K), dlogits (N, V)
    options = LossOptions(*loss_options)
    cross_entropy, targets = implementation("cross_entropy", backend), implementation("targets", backend)
    dtype = accumulation_dtype(logits.dtype)
    target, c = targets.coefficients(target, target_weight, options.ignore_index, reduction, every_loss, dtype)
    cross_entropy.check_targets(target, logits.shape[1], options.ignore_index)
    losses, dlogits = cross_entropy.loss_and_gradient(logits, target, c, options)
    return targets.weighted_sum(losses, c), losses, dlogits


@operator("scaled(Tensor values, Tensor scale, str backend) -> Tensor")
def _scaled(values: Tensor, scale: Tensor, backend: str) -> Tensor:
    out: Tensor = implementation("scaling", backend).scale_into(values.new_empty(values.shape), values, scale)
    return out


@operator("scale_(Tensor(a!) values, Tensor scale, str backend) -> ()")
def _scale_(values: Tensor, scale: Tensor, backend: str) -> None:
    implementation("scaling", backend).scale_(values, scale)


@fake("patch_cross_entropy_reduced")
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(target.shape, dtype=dtype),
        logits.new_empty(logits.shape),
    )


@fake("scaled")
def _(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape)


@fake("scale_")
def _(*_: Any) -> None:
    return


@fake("patch_cross_entropy")
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty((2, target.shape[0]), dtype=dtype)


@fake("patch_cross_entropy_backward")
def _(c: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)
