"""Shared by the three implementations of the fused linear loss: budgets, chunks, products, outputs, scales.

They work on chunks of rows, on slices of the vocabulary, and on chunks of rows with a sharded vocabulary.

Streams: all operators allocate, use and free their buffers on the current stream of the tensors' GPU, where Triton
launches kernels too. Autograd runs a backward on the stream of its forward. A buffer is therefore given out again only
for work that comes after its last use, and nothing here needs ``Tensor.record_stream``. Inputs that another stream
writes are the caller's to wait for, as with every operator of PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from patchkernels.numerics import accumulation_dtype

# Bytes of logits that are held at a time. The fp32 gradient of the head is read and written once for every chunk of
# rows, so few large chunks are faster. A loss without gradients has no such sum and takes smaller chunks.
LOGITS_BYTES = {"cuda": 2**30, "cpu": 2**26}
LOGITS_BYTES_LOSS_ONLY = {"cuda": 2**28, "cpu": 2**26}


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switches autocast off.

    A custom operator runs under the caller's autocast, which would turn its fp32 sums into 16 bits.
    """
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


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


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in the dtype of ``total``.

    On a GPU, 16-bit factors are multiplied as they are. This is what needs torch 2.10: older versions take a ``total``
    of the factors' dtype alone. Elsewhere the factors are first cast to the dtype of ``total``.
    """
    if a.is_cuda and a.dtype == b.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def new_outputs(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    target: Tensor,  # (N, K)
    c: Tensor | None,  # None: no gradients are wanted
    needs: Sequence[bool],
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # l (N, K), dx (N, D), dW (V, D), db (V)
    """Memory for the losses and gradients; gradients that are not needed are empty. dW and db are sums in fp32.

    It takes the arguments of the operators that return these four tensors, so that it is also their fake.
    """
    dtype = accumulation_dtype(x.dtype)
    need_dx, need_dw, need_db = (c is not None and needed for needed in needs)
    return (
        x.new_empty(target.shape, dtype=dtype),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw else (0,), dtype=dtype),
        x.new_empty(weight.shape[:1] if need_db else (0,), dtype=dtype),
    )


def power_of_two_scale(c: Tensor) -> tuple[Tensor, Tensor]:  # c (N, K)
    """``(scale, c / scale)`` with ``1 <= max_n sum_k |c_nk| / scale < 2``.

    dlogits computed from ``c / scale`` are of order 1. They do not underflow in fp16, whatever N is, and overflow only
    where the slope of the z-loss, ``2 z_loss_weight lse``, is beyond 32000. The scale is a power of two, so that
    multiplying a rounded gradient by it is exact.
    """
    largest = c.abs().sum(1).amax() if c.numel() else c.sum()
    scale = torch.where(largest != 0, largest.log2().floor().exp2(), 1)
    return scale, c / scale
