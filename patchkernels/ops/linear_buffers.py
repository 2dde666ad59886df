"""Shared by the three implementations of the fused linear loss: budgets, chunks, products, outputs, scales.

They work on chunks of rows, on slices of the vocabulary, and on chunks of rows with a sharded vocabulary.

Streams: all operators allocate, use and free their buffers on the current stream of the tensors' GPU, where Triton
launches kernels too. Autograd runs a backward on the stream of its forward. A buffer is therefore given out again only
for work that comes after its last use, and nothing here needs ``Tensor.record_stream``. Inputs that another stream
writes are the caller's to wait for, as with every operator of PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from patchkernels.ops.registration import Body

# Bytes of logits that are held at a time. Where all fit, the head's gradient is one product. Else it is a sum in fp32,
# which is read and written once for every chunk of rows. A loss without gradients has no such sum: smaller chunks.
LOGITS_BYTES = {"cuda": 2**31, "cpu": 2**26}
LOGITS_BYTES_LOSS_ONLY = {"cuda": 2**28, "cpu": 2**26}


def without_autocast(body: Body) -> Body:
    """The body of an operator, with autocast switched off.

    An operator runs under the caller's autocast, which would turn its fp32 sums into 16 bits.
    """

    @functools.wraps(body)
    def run(*arguments: Any) -> Any:
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return body(*arguments)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return body(*arguments)

    return cast(Body, run)


def known_to_be_true(condition: Any) -> bool:
    """The condition, on which torch.compile makes its graph depend; False where it cannot know a size."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return bool(condition)


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """The number of rows of a chunk: as few chunks as the budget allows, of about equal size.

    The number is a multiple of 128 where that fits the budget.
    """
    most = max(1, budget // max(row_bytes, 1))
    if rows <= most:
        return max(rows, 1)
    even = -(-rows // -(-rows // most))
    return min(-(-even // 128) * 128, most)


def logits_chunks(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    chunk: int,
    buffer: Tensor,  # (chunk, V)
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk and their logits, which lie in one buffer and are overwritten by the next chunk's."""
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        z = buffer[: len(x[rows])]
        multiply_into(z, x[rows], weight, bias)
        yield rows, z


def multiply_into(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``z = x W^T + b``"""
    if bias is None:
        torch.mm(x, weight.T, out=z)
    else:
        torch.addmm(bias, x, weight.T, out=z)


def multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, summed in fp32 (fp64 for fp64) and rounded once.

    ``out`` has the dtype of the factors, or fp32, or fp64: a GPU has no other products.
    """
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype == b.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in the dtype of ``total``.

    On a GPU, 16-bit factors are multiplied as they are. This is what needs torch 2.10: older versions take a ``total``
    of the factors' dtype alone. Elsewhere the factors are first cast to the dtype of ``total``.
    """
    if a.is_cuda and a.dtype == b.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def power_of_two_scale(c: Tensor) -> tuple[Tensor, Tensor]:  # c (N, K)
    """``(scale, c / scale)`` with ``1 <= max_n sum_k |c_nk| / scale < 2``.

    dlogits computed from ``c / scale`` are of order 1. They do not underflow in fp16, whatever N is, and overflow only
    where the slope of the z-loss, ``2 z_loss_weight lse``, is beyond 32000. The scale is a power of two, so that
    multiplying a rounded gradient by it is exact.
    """
    largest = c.abs().sum(1).amax() if c.numel() else c.sum()
    scale = torch.where(largest != 0, largest.log2().floor().exp2(), 1)
    return scale, c / scale
