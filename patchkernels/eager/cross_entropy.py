"""K-token cross entropy in plain PyTorch: the work of size V is done once per row, whatever K is.

    l[n, k]  = (max_n - z[n, t_nk]) + log sum_v exp(z[n, v] - max_n)
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
    "loss_and_gradient",
    "loss_and_gradient_",
    "slice_gradient_",
    "slice_statistics_",
]

# Bytes of fp32 logits that are passed over at a time: on a CPU they stay in its cache, elsewhere launches are few.
CHUNK_BYTES = {"cpu": 2**22, "other": 2**26}


def loss(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # l (N, K); max z and sum exp(z - max) (2, N)
    """Losses, and the statistics that the gradient needs. The logits stay unchanged."""
    dtype = accumulation_dtype(logits.dtype)
    losses = torch.empty(target.shape, dtype=dtype, device=logits.device)
    statistics = torch.empty(2, len(target), dtype=dtype, device=logits.device)
    for chunk in _chunks(logits):
        z = logits[chunk].to(dtype, copy=True)
        losses[chunk], statistics[:, chunk], _ = _losses_and_softmax_(z, target[chunk], options)
    return losses, statistics


def logits_gradient(
    c: Tensor,  # (N, K), dL/dl
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (2, N): max z, sum exp(z - max)
    options: LossOptions,
) -> Tensor:  # (N, V)
    """dlogits, in the dtype of the logits, which stay unchanged."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for chunk in _chunks(logits):
        z, vocab = logits[chunk].to(statistics.dtype, copy=True), logits.shape[1]
        dlogits[chunk] = slice_gradient_(z, 0, vocab, target[chunk], c[chunk], statistics[:, chunk], options)
    return dlogits


def loss_and_gradient(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # l (N, K); dlogits (N, V), in the dtype of the logits
    """Losses and dlogits. The logits stay unchanged."""
    losses = torch.empty(target.shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _fill(losses, dlogits, logits, target, c, options)
    return losses, dlogits


def loss_and_gradient_(
    logits: Tensor,  # (N, V), a buffer of the library
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    losses: Tensor,  # (N, K)
    options: LossOptions,
) -> Tensor | None:  # (N, V)
    """Fills ``losses``; with ``c`` also overwrites the logits with dlogits and returns them."""
    _fill(losses, logits, logits, target, c, options)
    return None if c is None else logits


def _fill(
    losses: Tensor,  # (N, K)
    dlogits: Tensor,  # (N, V), may be the logits
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K); None: the losses alone, and the logits may be overwritten
    options: LossOptions,
) -> None:
    """Writes losses and dlogits, some rows at a time, in fp32 (fp64 for fp64)."""
    dtype, wide = accumulation_dtype(logits.dtype), None
    for rows in _chunks(logits):
        if dtype != logits.dtype and wide is None:
            wide = logits.new_empty(logits[rows].shape, dtype=dtype)  # the first chunk is the largest
        z = dlogits[rows] if wide is None else wide[: len(logits[rows])]
        if wide is not None or dlogits is not logits:
            z.copy_(logits[rows])
        losses[rows], statistics, slope = _losses_and_softmax_(z, target[rows], options)
        if c is not None:
            _gradient_(z, target[rows], c[rows], statistics, slope, options)
            if wide is not None:
                dlogits[rows] = z


def slice_statistics_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (3, N), of the classes before ``first`` or of none; see :func:`numerics.new_statistics`
    picked: Tensor,  # (N, K), the logits of the targets
    options: LossOptions,
    *,
    keep_logits: bool,
) -> None:
    """Updates the statistics of the rows with the logits of more classes.

    Without ``keep_logits`` the logits may be overwritten.
    """
    z = logits.to(statistics.dtype, copy=keep_logits)
    _cap_(z, options.softcap)
    _exponentials_(z, first, target, statistics, picked, options)


def slice_gradient_(
    logits: Tensor,  # (N, v), of the classes from ``first`` on
    first: int,
    vocab: int,
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    statistics: Tensor,  # (2, N): max z and sum exp(z - max) over the whole vocabulary
    options: LossOptions,
) -> Tensor:  # (N, v)
    """dlogits of these classes, in the dtype of the logits, which may be overwritten."""
    z = logits.to(accumulation_dtype(logits.dtype))
    slope = _cap_(z, options.softcap)
    largest, total = statistics.unsqueeze(2).unbind()
    exponentials = z.sub_(largest).exp_()
    dz = _gradient_(exponentials, target, c, statistics, slope, options, first, vocab, total=total)
    return dz.to(logits.dtype)


def logits_buffer(rows: int, weight: Tensor) -> Tensor:  # (rows, V)
    """Memory for the logits of some rows."""
    return weight.new_empty(rows, len(weight))


def bytes_per_logit(dtype: torch.dtype, options: LossOptions) -> int:
    """Bytes needed per logit of a slice: itself, 8 for fp32 copies if it has 16 bits, twice the sum with a soft cap."""
    size = dtype.itemsize + (8 if dtype.itemsize == 2 else 0)
    return size if options.softcap is None else 2 * size


def _chunks(logits: Tensor) -> list[slice]:
    chunk_bytes = CHUNK_BYTES["cpu" if logits.device.type == "cpu" else "other"]
    size = max(1, chunk_bytes // (4 * logits.shape[1]))
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _losses_and_softmax_(
    z: Tensor,  # (n, V)
    target: Tensor,  # (n, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:  # l (n, K), max z and sum exp(z - max) (2, n), slope of the soft cap (n, V)
    """Losses and statistics of whole rows. Overwrites the logits with their softmax.

    The softmax of the largest logit is ``1 / sum exp(z - max)``, so that the sum costs no exponentials of its own.
    """
    slope = _cap_(z, options.softcap)
    largest = z.amax(1)
    picked = z.gather(1, target.clamp(0, z.shape[1] - 1).long())
    below = z.sub_(largest.unsqueeze(1)).sum(1) if options.label_smoothing else torch.zeros_like(largest)
    torch.softmax(z, 1, out=z)
    statistics = torch.stack([largest, z.amax(1).reciprocal_(), below])
    return row_losses(statistics, picked, target, z.shape[1], options), statistics[:2], slope


def _cap_(z: Tensor, softcap: float | None) -> Tensor | None:
    """``z <- softcap tanh(z / softcap)`` in place; returns the slope ``1 - tanh^2``, or None without a soft cap."""
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    slope = 1 - z * z
    z.mul_(softcap)
    return slope


def _exponentials_(
    z: Tensor,  # (n, v), of the classes from ``first`` on
    first: int,
    target: Tensor,  # (n, K)
    statistics: Tensor,  # (3, n)
    picked: Tensor,  # (n, K)
    options: LossOptions,
) -> None:
    """Updates the statistics with more classes. Overwrites the logits with ``exp(z - max)``."""
    column = target - first
    inside = (column >= 0) & (column < z.shape[1])
    picked.copy_(torch.where(inside, z.gather(1, column.clamp(0, z.shape[1] - 1).long()), picked))
    largest, total, below = statistics
    new_largest = torch.maximum(largest, z.amax(1))
    shift = new_largest.masked_fill(new_largest == -torch.inf, 0)  # -inf - -inf is NaN
    moved = (largest - shift).masked_fill(largest == -torch.inf, 0)
    z.sub_(shift.unsqueeze(1))
    if options.label_smoothing:
        below += first * moved + z.sum(1)
    total.mul_(moved.exp()).add_(z.exp_().sum(1))
    largest.copy_(new_largest)


def _gradient_(
    exponentials: Tensor,  # (n, v), exp(z - max) of the classes from ``first`` on, divided by ``total`` if that is None
    target: Tensor,  # (n, K)
    c: Tensor,  # (n, K), dL/dl
    statistics: Tensor,  # (2, n): max z, sum exp(z - max)
    slope: Tensor | None,  # (n, v), of the soft cap
    options: LossOptions,
    first: int = 0,
    vocab: int | None = None,  # None: all classes are here
    total: Tensor | None = None,  # (n, 1), sum exp(z - max)
) -> Tensor:  # (n, v)
    """``dz = slope ((sum_k c_k) (p (1 + 2 z_loss_weight lse) - e/V) - (1-e) sum_k c_k onehot(t_k))``.

    ``p = exp(z - max) / total``, and ``e`` is ``label_smoothing``. A row whose ``c`` are all 0 has the gradient 0,
    whatever its logits are. Overwrites the exponentials with the gradient.
    """
    dz = exponentials
    c = c.masked_fill(target == options.ignore_index, 0)
    total_c = c.sum(1, keepdim=True)
    factor = total_c if total is None else total_c / total
    if options.z_loss_weight:
        largest, sums = statistics.unsqueeze(2).unbind()
        factor = factor * (1 + 2 * options.z_loss_weight * (largest + sums.log()))
    dz.mul_(factor)
    if options.label_smoothing:
        dz.sub_(total_c * (options.label_smoothing / (vocab or dz.shape[1])))
    column = target - first
    inside = (column >= 0) & (column < dz.shape[1])
    at_target = torch.where(inside, c * (options.label_smoothing - 1), 0)
    dz.scatter_add_(1, column.clamp(0, dz.shape[1] - 1).long(), at_target)
    if slope is not None:
        dz.mul_(slope)
    return _zero_rows_(dz, (c == 0).all(1))


def _zero_rows_(values: Tensor, rows: Tensor) -> Tensor:  # (n, v) and (n)
    """Sets these rows to 0. On a CPU it touches no others; elsewhere finding them would wait for the device."""
    if values.device.type == "cpu":
        return values.index_fill_(0, rows.nonzero().squeeze(1), 0)
    return values.masked_fill_(rows.unsqueeze(1), 0)
