"""K-token cross entropy in plain PyTorch: the work of size V is done once per row, whatever K is.

    l[n, k]  = lse_n - z[n, t_nk]
    dz[n, :] = (sum_k c_nk) softmax(z_n) - sum_k c_nk onehot(t_nk)

Statistics and gradients are computed in fp32 (fp64 for fp64), one chunk of rows or slice of the vocabulary at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkernels.numerics import LossOptions, accumulation_dtype, check_targets, row_losses

__all__ = [
    "bytes_per_logit",
    "check_targets",
    "logits_buffer",
    "logits_gradient",
    "loss",
    "loss_and_gradient_",
    "slice_gradient_",
    "slice_statistics_",
]

CHUNK_BYTES = 2**24  # the most bytes of fp32 logits that `loss` and `logits_gradient` hold at a time


def loss(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # l (N, K), lse (N)
    """Losses and log-sum-exp. The logits stay unchanged."""
    dtype = accumulation_dtype(logits.dtype)
    losses = torch.empty(target.shape, dtype=dtype, device=logits.device)
    lse = torch.empty(len(target), dtype=dtype, device=logits.device)
    for chunk in _chunks(logits):
        losses[chunk], lse[chunk], _ = _softmax_(logits[chunk].to(dtype, copy=True), target[chunk], options)
    return losses, lse


def logits_gradient(
    c: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    lse: Tensor,  # (N)
    options: LossOptions,
) -> Tensor:  # (N, V)
    """dlogits, in the dtype of the logits, which stay unchanged."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for chunk in _chunks(logits):
        p = logits[chunk].to(accumulation_dtype(logits.dtype), copy=True)
        _, _, slope = _softmax_(p, target[chunk], options)
        dlogits[chunk] = _softmax_to_gradient_(p, target[chunk], c[chunk], lse[chunk], slope, options)
    return dlogits


def loss_and_gradient_(
    logits: Tensor,  # (N, V), a buffer of the library
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    losses: Tensor,  # (N, K)
    options: LossOptions,
) -> Tensor | None:  # (N, V)
    """Fills ``losses``; with ``c`` returns dlogits in fp32 (fp64 for fp64). The logits may be overwritten."""
    p = logits.to(accumulation_dtype(logits.dtype))
    losses[:], lse, slope = _softmax_(p, target, options)
    return None if c is None else _softmax_to_gradient_(p, target, c, lse, slope, options)


def slice_statistics_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (3, N): max z, sum exp(z - max), sum z
    picked: Tensor,  # (N, K), the logits of the targets
    options: LossOptions,
    *,
    keep_logits: bool,
) -> None:
    """Updates the statistics of the rows with the logits of more classes.

    Without ``keep_logits`` the logits may be overwritten.
    """
    z = logits.to(statistics.dtype, copy=keep_logits)
    if options.softcap is not None:
        _cap_(z, options.softcap)
    column = target - first
    inside = (column >= 0) & (column < z.shape[1])
    found = z.gather(1, column.clamp(0, z.shape[1] - 1).long())
    picked.copy_(torch.where(inside, found, picked))
    largest, total, sum_z = statistics
    new_largest = torch.maximum(largest, z.amax(1))
    shift = new_largest.masked_fill(new_largest == -torch.inf, 0)
    sum_z += z.sum(1)
    total.mul_((largest - shift).exp_()).add_(z.sub_(shift.unsqueeze(1)).exp_().sum(1))
    largest.copy_(new_largest)


def slice_gradient_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    vocab: int,
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    lse: Tensor,  # (N), over the whole vocabulary
    options: LossOptions,
) -> Tensor:  # (N, v)
    """dlogits of these classes, in the dtype of the logits, which may be overwritten."""
    p = logits.to(accumulation_dtype(logits.dtype))
    slope = None if options.softcap is None else _cap_(p, options.softcap)
    p.sub_(lse.unsqueeze(1)).exp_()
    return _softmax_to_gradient_(p, target, c, lse, slope, options, first, vocab).to(logits.dtype)


def logits_buffer(rows: int, weight: Tensor) -> Tensor:  # (rows, V)
    """Memory for the logits of some rows."""
    return weight.new_empty(rows, len(weight))


def bytes_per_logit(dtype: torch.dtype, options: LossOptions) -> int:
    """Bytes needed per logit of a slice: itself, 8 for fp32 copies if it has 16 bits, twice the sum with a soft cap."""
    size = dtype.itemsize + (8 if dtype.itemsize == 2 else 0)
    return size if options.softcap is None else 2 * size


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _softmax_(
    z: Tensor,  # (n, V)
    target: Tensor,  # (n, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:  # l (n, K), lse (n), slope of the soft cap (n, V)
    """Losses and log-sum-exp. Overwrites the logits with their softmax."""
    slope = None if options.softcap is None else _cap_(z, options.softcap)
    picked = z.gather(1, target.clamp(0, z.shape[1] - 1).long())
    largest = z.amax(1)
    mean = z.mean(1) if options.label_smoothing else largest
    torch.softmax(z, 1, out=z)
    lse = largest - z.amax(1).log_()  # the largest probability is exp(largest - lse)
    return row_losses(lse, picked, mean, target, z.shape[1], options), lse, slope


def _cap_(z: Tensor, softcap: float) -> Tensor:
    """``z <- softcap tanh(z / softcap)`` in place; returns the slope ``1 - tanh^2``."""
    z.div_(softcap).tanh_()
    slope = 1 - z * z
    z.mul_(softcap)
    return slope


def _softmax_to_gradient_(
    p: Tensor,  # (n, v), probabilities of the classes from ``first`` on
    target: Tensor,  # (n, K)
    c: Tensor,  # (n, K), dL/dl
    lse: Tensor,  # (n)
    slope: Tensor | None,  # (n, v), of the soft cap
    options: LossOptions,
    first: int = 0,
    vocab: int | None = None,  # None: ``p`` holds all classes
) -> Tensor:  # (n, v)
    """``dz = slope ((sum_k c_k) (p (1 + 2 z_loss_weight lse) - e/V) - (1-e) sum_k c_k onehot(t_k))``.

    Overwrites ``p`` with it. ``e`` is ``label_smoothing``.
    """
    c = c.masked_fill(target == options.ignore_index, 0)
    total = c.sum(1, keepdim=True)
    p.mul_(total * (1 + 2 * options.z_loss_weight * lse.unsqueeze(1)) if options.z_loss_weight else total)
    if options.label_smoothing:
        p.sub_(total * (options.label_smoothing / (vocab or p.shape[1])))
    column = target - first
    inside = (column >= 0) & (column < p.shape[1])
    c = torch.where(inside, c * (options.label_smoothing - 1), 0)
    p.scatter_add_(1, column.clamp(0, p.shape[1] - 1).long(), c)
    return p if slope is None else p.mul_(slope)
