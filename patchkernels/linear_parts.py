"""What the two pipelines of the fused linear loss share: budgets, buffers, one matrix product, one scale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

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
