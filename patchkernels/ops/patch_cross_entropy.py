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
from patchkernels.ops.derivatives import first_derivative_only
from patchkernels.ops.targets import check_loss_arguments, reduce_losses, weigh_targets


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
        input: logits, shape ``(..., V)``; float32, bfloat16, float16 (float64 too in the eager backend). Never
            overwritten. Statistics are taken in fp32.
        target: class indices, shape ``(..., K)``, or ``(...)`` for K = 1; int32 or int64.
        target_weight: shape ``(K,)`` or that of ``target``; a constant (no gradient).
        ignore_index: targets of this value have weight 0.
        reduction: ``"mean"``: ``sum w l / sum w`` over all valid targets; ``"slot_mean"`` (both papers): for each
            slot k the mean over the rows whose k-th target is valid, then the mean over slots, weighted by a ``(K,)``
            ``target_weight``, without slots that have no valid target; ``"sum"``; ``"none"``: weighted, in the shape of
            ``target``. If every target is ignored, both means are 0 with zero gradients (``F.cross_entropy`` gives
            NaN).
        label_smoothing: ``e`` in ``l = (1-e) (lse - z_t) + e (lse - mean_v z_v)``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        z_loss_weight: adds ``z_loss_weight * lse^2`` to each ``l``.
        return_losses: returns ``(loss, losses)``. ``losses`` are the ``l`` before weighting and reduction, without
            gradient, in the shape of ``target``; 0 for ignored targets.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        a scalar, or the shape of ``target`` for ``reduction="none"``; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes or devices that do not fit, an unknown reduction, an option out of its range.
        TypeError: dtypes other than those above.
        RuntimeError: a backend that cannot run.
        IndexError: a target outside [0, V) that is not ``ignore_index``, on a CPU. On a GPU, where raising would
            cost a synchronisation, that target's loss is NaN and no memory out of bounds is read.
    """
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    check_loss_arguments(input, target, input.shape[-1] if input.ndim else 0, options, "logits (..., V)")
    logits = input.reshape(-1, input.shape[-1])
    row_targets, c = weigh_targets(input, target, target_weight, ignore_index, reduction)
    losses, _ = _PatchCrossEntropy.apply(logits, row_targets, options, choose_backend(backend, input))
    loss = reduce_losses(losses, c, target.shape, reduction)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


class _PatchCrossEntropy(torch.autograd.Function):
    """Maps rows of logits and targets to ``l (N, K)`` and ``lse (N)``; the backward reads the logits once more."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor, options: LossOptions, backend: str) -> tuple[Tensor, Tensor]:
        losses, lse = torch.ops.patchkernels.patch_cross_entropy(logits, target, backend, *options)
        return losses, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, LossOptions, str], output: tuple[Tensor, Tensor]) -> None:
        logits, target, ctx.options, ctx.backend = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(logits, target, lse)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        op = torch.ops.patchkernels.patch_cross_entropy_backward
        return op(grad, *ctx.saved_tensors, ctx.backend, *ctx.options), None, None, None


@torch.library.custom_op(
    "patchkernels::patch_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, str backend, {LOSS_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor]:  # l (N, K), lse (N)
    options, cross_entropy = LossOptions(*loss_options), implementation("cross_entropy", backend)
    cross_entropy.check_targets(target, logits.shape[1], options.ignore_index)
    losses, lse = cross_entropy.loss(logits, target, options)
    return losses, lse


@torch.library.custom_op(
    "patchkernels::patch_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor c, Tensor logits, Tensor target, Tensor lse, str backend, {LOSS_OPTIONS}) -> Tensor",
)
def _backward(
    c: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    lse: Tensor,  # (N)
    backend: str,
    *loss_options: Any,
) -> Tensor:  # (N, V)
    cross_entropy = implementation("cross_entropy", backend)
    dlogits: Tensor = cross_entropy.logits_gradient(c, logits, target, lse, LossOptions(*loss_options))
    return dlogits


@_forward.register_fake
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty(target.shape[:1], dtype=dtype)


@_backward.register_fake
def _(c: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)
