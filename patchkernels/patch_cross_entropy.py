"""Operator 2, K-token cross entropy over one row of logits.

    loss[n, k] = w[n, k] (lse_n - z[n, t_nk])
    dz[n, :]   = (sum_k c_nk) softmax(z_n) - sum_k c_nk onehot(t_nk),     c = upstream * w / normaliser

Ignored labels, weights, overlapping or repeated targets and every reduction are the matrix ``c``, of shape (N, K):
the work of size V is done once a row, whatever K is. The Triton kernel is in ``kernels/cross_entropy.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchkernels import backend as _backend
from patchkernels.patch_embedding import accumulation_dtype

REDUCTIONS = ("mean", "slot_mean", "sum", "none")
EAGER_CHUNK_BYTES = 2**24  # rows of logits that the eager code holds in fp32 at a time


def next_patch_targets(
    labels: Tensor, patch_size: int, ignore_index: int = -100, *, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """``target[b, p, k] = labels[b, (p + 1) K + k]``; the last row is all ``ignore_index``.

    Row p holds the tokens of patch p + 1, so that there are as many rows as hidden states and nobody slices or
    shifts. At K = 1 these are the labels of ordinary next-token training, shape ``(B, T, 1)``.

    Args:
        labels: unshifted labels, shape ``(..., T)`` with T divisible by ``patch_size``.
        process_group: the sequence is split over its processes in the order of ranks, at patch boundaries (context
            parallel): ``labels`` are this process's part, of whatever length. Its last row is then the first patch of
            the next process, which each tells all. For the mean over the whole sequence let every process take
            ``reduction="sum"`` and divide by the number of valid targets of all.

    Returns:
        shape ``(..., T / K, K)``.

    Raises:
        ValueError: K < 1, or T not divisible by K.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if labels.ndim == 0 or labels.shape[-1] % patch_size:
        raise ValueError(
            f"labels must have shape (..., T) with T divisible by patch_size, got {tuple(labels.shape)} "
            f"and patch_size={patch_size}"
        )
    patches = labels.unflatten(-1, (labels.shape[-1] // patch_size, patch_size))
    last = torch.full_like(patches[..., :1, :], ignore_index)
    if process_group is not None:
        if not labels.shape[-1]:
            raise ValueError(f"every process needs a patch of the sequence, got labels {tuple(labels.shape)}")
        firsts = [torch.empty_like(last) for _ in range(process_group.size())]
        dist.all_gather(firsts, patches[..., :1, :].contiguous(), process_group)
        last = [*firsts, last][process_group.rank() + 1]
    return torch.cat([patches[..., 1:, :], last], dim=-2)


class LossOptions(NamedTuple):
    """What a row's loss depends on beside logits and targets."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss_weight: float = 0.0


def patch_cross_entropy(
    input: Tensor,  # logits (..., V)
    target: Tensor,  # (..., K), or (...) for K = 1
    *,
    target_weight: Tensor | None = None,  # (K) or (..., K)
    ignore_index: int = -100,
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
        input: logits, shape ``(..., V)``; float32, bfloat16, float16 (float64 too on the eager path). Never
            overwritten. Statistics are taken in fp32.
        target: class indices, shape ``(..., K)``, or ``(...)`` for K = 1; int32 or int64.
        target_weight: shape ``(K,)`` or that of ``target``; a constant (no gradient).
        ignore_index: targets of this value have weight 0.
        reduction: ``"mean"``: ``sum w l / sum w`` over all valid targets; ``"slot_mean"`` (both papers): the mean
            over valid rows in each slot first, then over slots, weighted by a ``(K,)`` ``target_weight``, a slot
            without a valid row left out; ``"sum"``; ``"none"``: weighted, in the shape of ``target``.
            Where every target is ignored both means are 0 with zero gradients (``F.cross_entropy`` gives NaN).
        label_smoothing: ``e`` in ``l = (1-e) (lse - z_t) + e (lse - mean_v z_v)``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        z_loss_weight: adds ``z_loss_weight * lse^2`` to each ``l``.
        return_losses: also what was reduced: ``(loss, losses)``, the latter without gradient, unweighted, in the
            shape of ``target``, 0 where that is ignored.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        a scalar, or the shape of ``target`` for ``reduction="none"``; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes that do not fit, two devices, an unknown reduction, an option out of its range.
        TypeError: dtypes other than those above.
        IndexError: a target outside [0, V) that is not ``ignore_index``, on a CPU. On a GPU, where raising would
            cost a synchronisation, that target's loss is NaN and no memory outside is read.
    """
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    check_arguments(input, target, input.shape[-1] if input.ndim else 0, options, "logits (..., V)")
    logits = input.reshape(-1, input.shape[-1])
    rows, coefficient = weigh_targets(input, target, target_weight, ignore_index, reduction)
    losses, _ = _PatchCrossEntropy.apply(logits, rows, options, _backend.resolve(backend, input))
    loss = reduce_losses(losses, coefficient, target.shape, reduction)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


def check_arguments(input: Tensor, target: Tensor, vocab: int, options: LossOptions, kind: str) -> None:
    """Raises ValueError or TypeError before any work; ``kind`` names the input in the message."""
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    if input.ndim == 0 or vocab == 0:
        raise ValueError(f"input must be {kind} with at least one class, got shape {tuple(input.shape)}")
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target must be class indices, int32 or int64, got {target.dtype}")
    if target.shape[: input.ndim - 1] != input.shape[:-1] or target.ndim not in (input.ndim - 1, input.ndim):
        raise ValueError(
            f"target must have shape (..., K) or (...) for an input of {kind}: got target {tuple(target.shape)} "
            f"for input {tuple(input.shape)}"
        )
    if target.ndim == input.ndim and target.shape[-1] == 0:
        raise ValueError(f"target must hold at least one label a row, got shape {tuple(target.shape)}")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} but input is on {input.device}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {options.label_smoothing}")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"softcap must be positive, got {options.softcap}")
    if not options.z_loss_weight >= 0:
        raise ValueError(f"z_loss_weight must not be negative, got {options.z_loss_weight}")


def weigh_targets(
    input: Tensor, target: Tensor, target_weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """Targets as rows ``(N, K)``, those of weight 0 ignored, and the matrix ``c (N, K)`` with loss = sum c l.

    For ``reduction="none"`` the loss is ``c * l``. Nothing here is of size V and nothing synchronises.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    dtype = accumulation_dtype(input.dtype)
    slots = target.shape[-1] if target.ndim == input.ndim else 1
    rows = target.reshape(-1, slots)
    valid = rows != ignore_index
    slot_weight = torch.ones(slots, dtype=dtype, device=rows.device)
    weight = valid.to(dtype)
    if target_weight is not None:
        if target_weight.requires_grad:
            raise ValueError("target_weight is a constant of the loss; got a tensor that requires grad")
        if target_weight.device != target.device:
            raise ValueError(f"target_weight is on {target_weight.device} but target is on {target.device}")
        if target_weight.shape not in ((slots,), target.shape):
            raise ValueError(
                f"target_weight must have shape ({slots},) or {tuple(target.shape)}, got {tuple(target_weight.shape)}"
            )
        if target_weight.shape == (slots,):
            slot_weight = target_weight.to(dtype)
            weight = weight * slot_weight
        elif reduction == "slot_mean":
            raise ValueError(
                f"reduction='slot_mean' takes a target_weight of shape ({slots},), one weight a slot, "
                f"got {tuple(target_weight.shape)}"
            )
        else:
            weight = weight * target_weight.reshape(-1, slots).to(dtype)
    rows = torch.where(weight != 0, rows, ignore_index)
    if reduction == "mean":
        weight = _divide(weight, weight.sum())
    elif reduction == "slot_mean":
        count = valid.sum(0)
        used = torch.where(count > 0, slot_weight, 0)
        weight = _divide(valid * _divide(used, used.sum()), count)
    return rows, weight


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0."""
    return torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1), 0)


def reduce_losses(losses: Tensor, coefficient: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    """``sum c l``, or ``c * l`` in the shape of the targets; losses of ignored targets are 0, never NaN."""
    weighted = losses * coefficient
    return weighted.reshape(shape) if reduction == "none" else weighted.sum()


class _PatchCrossEntropy(torch.autograd.Function):
    """Rows of logits and targets to ``l (N, K)`` and ``lse (N)``; the backward reads the logits once more."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor, options: LossOptions, backend: str) -> tuple[Tensor, Tensor]:
        losses, lse = torch.ops.patchkernels.patch_cross_entropy(logits, target, *options, backend)
        return losses, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, LossOptions, str], output: tuple[Tensor, Tensor]) -> None:
        logits, target, ctx.options, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, target, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target, lse = ctx.saved_tensors
        op = torch.ops.patchkernels.patch_cross_entropy_backward
        return op(grad, logits, target, lse, *ctx.options, ctx.backend), None, None, None


@torch.library.custom_op("patchkernels::patch_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    if backend == "triton":
        from patchkernels.kernels import cross_entropy as kernels

        return kernels.loss(logits, target, options)
    check_range(target, logits.shape[1], ignore_index)
    dtype = accumulation_dtype(logits.dtype)
    losses = torch.empty(target.shape, dtype=dtype, device=logits.device)
    lse = torch.empty(len(target), dtype=dtype, device=logits.device)
    for rows in _chunks(logits):
        losses[rows], lse[rows], _ = softmax_(logits[rows].to(dtype, copy=True), target[rows], options)
    return losses, lse


@_forward.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty(target.shape[:1], dtype=dtype)


@torch.library.custom_op("patchkernels::patch_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    lse: Tensor,  # (N)
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    backend: str,
) -> Tensor:
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    if backend == "triton":
        from patchkernels.kernels import cross_entropy as kernels

        return kernels.logits_gradient(grad, logits, target, lse, options)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _chunks(logits):
        p = logits[rows].to(accumulation_dtype(logits.dtype), copy=True)
        _, _, slope = softmax_(p, target[rows], options)
        dlogits[rows] = softmax_to_gradient_(p, target[rows], grad[rows], lse[rows], slope, options)
    return dlogits


@_backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, EAGER_CHUNK_BYTES // (4 * logits.shape[1]))
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def check_range(target: Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError for a target outside [0, V), where looking costs no synchronisation."""
    if target.device.type == "cpu":
        bad = target[(target != ignore_index) & ((target < 0) | (target >= vocab))]
        if len(bad):
            raise IndexError(f"targets must be in [0, {vocab}) or ignore_index={ignore_index}, got {bad[0].item()}")


def softmax_(z: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor | None]:
    """``l (n, K)``, ``lse (n)``, and the softcap's slope; the logits ``z (n, V)`` become their softmax in place."""
    slope = None if options.softcap is None else cap_(z, options.softcap)
    picked = z.gather(1, target.clamp(0, z.shape[1] - 1).long())
    largest = z.amax(1)
    mean = z.mean(1) if options.label_smoothing else largest
    torch.softmax(z, 1, out=z)
    lse = largest - z.amax(1).log_()  # the largest probability is exp(largest - lse)
    return row_losses(lse, picked, mean, target, z.shape[1], options), lse, slope


def cap_(z: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(z / softcap)`` in place; returns the slope ``1 - tanh^2``."""
    z.div_(softcap).tanh_()
    slope = 1 - z * z
    z.mul_(softcap)
    return slope


def row_losses(
    lse: Tensor,  # (n)
    picked: Tensor,  # (n, K), the targets' logits
    mean: Tensor,  # (n), over the logits of a row; read with label smoothing alone
    target: Tensor,  # (n, K)
    vocab: int,
    options: LossOptions,
) -> Tensor:
    """``l (n, K)`` from the statistics of rows: 0 for ignored targets, NaN for those out of range."""
    lse = lse.unsqueeze(1)
    losses = lse - (1 - options.label_smoothing) * picked
    if options.label_smoothing:
        losses = losses - options.label_smoothing * mean.unsqueeze(1)
    if options.z_loss_weight:
        losses = losses + options.z_loss_weight * lse**2
    losses = losses.masked_fill((target < 0) | (target >= vocab), torch.nan)
    return losses.masked_fill(target == options.ignore_index, 0)


def softmax_to_gradient_(
    p: Tensor,
    target: Tensor,
    c: Tensor,
    lse: Tensor,
    slope: Tensor | None,
    options: LossOptions,
    first: int = 0,
    vocab: int | None = None,
) -> Tensor:
    """``dz = (sum_k c_k) p (1 + 2 z_loss lse) - (1-e) sum_k c_k onehot(t_k) - e/V sum_k c_k``, over ``p`` in place.

    ``p`` may be the classes from ``first`` on of a vocabulary of ``vocab``.
    """
    c = c.masked_fill(target == options.ignore_index, 0)
    total = c.sum(1, keepdim=True)
    p.mul_(total * (1 + 2 * options.z_loss_weight * lse.unsqueeze(1)) if options.z_loss_weight else total)
    if options.label_smoothing:
        p.sub_(total * (options.label_smoothing / (vocab or p.shape[1])))
    place = target - first
    inside = (place >= 0) & (place < p.shape[1])
    c = torch.where(inside, c * (options.label_smoothing - 1), 0)
    p.scatter_add_(1, place.clamp(0, p.shape[1] - 1).long(), c)
    return p if slope is None else p.mul_(slope)
