"""What the pipelines of the fused linear loss share: budgets, buffers, a product, a scale, slices of the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from patchkernels.patch_cross_entropy import LossOptions, cap_, softmax_to_gradient_
from patchkernels.patch_embedding import accumulation_dtype

# Bytes of logits held at a time. fp32 dW is read and written once a chunk, so few large chunks are fast; a loss
# without gradients has no dW and takes smaller ones.
LOGITS_BYTES = {"cuda": 2**30, "cpu": 2**26}
LOGITS_BYTES_LOSS_ONLY = {"cuda": 2**28, "cpu": 2**26}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A custom op's body runs under the caller's autocast, which would cast our fp32 sums."""

    @functools.wraps(function)
    def body(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return body


def unit_scale(c: Tensor) -> tuple[Tensor, Tensor]:
    """``c = scale * unit`` with ``1 <= max |unit| < 2``: dlogits of order 1 do not vanish in fp16, whatever N is.

    The scale is a power of two, so that multiplying a rounded gradient by it rounds nothing.
    """
    largest = c.abs().amax() if c.numel() else c.sum()
    scale = torch.where(largest != 0, largest.log2().floor().exp2(), 1)
    return scale, c / scale


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """Rows a chunk: even chunks within the budget, in multiples of 128 where that costs no more than the budget."""
    most = max(1, budget // max(row_bytes, 1))
    if rows <= most:
        return max(rows, 1)
    even = -(-rows // -(-rows // most))
    return min(-(-even // 128) * 128, most)


def logits_buffer(rows: int, weight: Tensor, backend: str) -> Tensor:
    """``(rows, V)``; for kernels and cuBLAS rows begin on 16-element boundaries, for vector loads at any V."""
    vocab = len(weight)
    return weight.new_empty(rows, -(-vocab // 16) * 16 if backend == "triton" else vocab)[:, :vocab]


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``; on a GPU from 16-bit factors, without a copy of them."""
    if a.is_cuda and a.dtype == b.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def slice_statistics_(
    z: Tensor,  # (N, v), the logits of the classes from ``first`` on; eager code overwrites them
    first: int,
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (3, N): max z, sum exp(z - max), sum z
    picked: Tensor,  # (N, K), the targets' logits
    options: LossOptions,
    backend: str,
) -> None:
    """Goes on with the statistics of rows over some more of their classes."""
    if backend == "triton":
        from patchkernels.kernels import cross_entropy as kernels

        kernels.slice_statistics_(z, first, target, statistics, picked, options)
        return
    z = z.to(statistics.dtype)
    if options.softcap is not None:
        cap_(z, options.softcap)
    place = target - first
    inside = (place >= 0) & (place < z.shape[1])
    found = z.gather(1, place.clamp(0, z.shape[1] - 1).long())
    picked.copy_(torch.where(inside, found, picked))
    largest, total, sum_z = statistics
    new_largest = torch.maximum(largest, z.amax(1))
    shift = new_largest.masked_fill(new_largest == -torch.inf, 0)
    sum_z += z.sum(1)
    total.mul_((largest - shift).exp_()).add_(z.sub_(shift.unsqueeze(1)).exp_().sum(1))
    largest.copy_(new_largest)


def slice_dlogits(
    z: Tensor,  # (N, v); kernels overwrite them
    first: int,
    vocab: int,
    target: Tensor,  # (N, K)
    c: Tensor,  # (N, K), dL/dl
    lse: Tensor,  # (N), over the whole vocabulary
    options: LossOptions,
    backend: str,
) -> Tensor:
    """``dz (N, v)`` of the classes from ``first`` on, in the dtype of ``z``."""
    if backend == "triton":
        from patchkernels.kernels import cross_entropy as kernels

        kernels.slice_gradient_(z, first, vocab, target, c, lse, options)
        return z
    p = z.to(accumulation_dtype(z.dtype))
    slope = None if options.softcap is None else cap_(p, options.softcap)
    p.sub_(lse.unsqueeze(1)).exp_()
    return softmax_to_gradient_(p, target, c, lse, slope, options, first, vocab).to(z.dtype)


def linear_outputs(
    x: Tensor, weight: Tensor, target: Tensor, c: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``l (N, K)``, ``dx (N, D)``, ``dW (V, D)`` and ``db (V)`` in fp32; those not needed are empty."""
    dtype = accumulation_dtype(x.dtype)
    wanted = [c is not None and needed for needed in needs]
    return (
        x.new_empty(target.shape, dtype=dtype),
        x.new_empty(x.shape if wanted[0] else (0,)),
        x.new_empty(weight.shape if wanted[1] else (0,), dtype=dtype),
        x.new_empty(weight.shape[:1] if wanted[2] else (0,), dtype=dtype),
    )


def linear_flops(
    x_shape: Any,
    w_shape: Any,
    bias: Any,
    target: Any,
    c: Any,
    needs: Any,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """``2 N V D`` for the logits, and as much for dx and for dW."""
    products = 1 if c is None else 1 + needs[0] + needs[1]
    return int(2 * x_shape[0] * x_shape[1] * w_shape[0] * products)
