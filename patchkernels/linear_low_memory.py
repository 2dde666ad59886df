"""Operator 2 with the head fused in, in the least memory: ``linear_patch_cross_entropy(..., memory="low")``.

The logits exist in slices of the vocabulary, a few classes of all rows at a time:

    forward    z_s = x W_s^T;   max, sum exp, sum z and z[target] of each row go on          1 product
    backward   z_s = x W_s^T;   dz_s in place;   dW_s = dz_s^T x;   dx += dz_s W_s           3 products

Between the two only the log-sum-exp of each row is kept. A slice of dW is one product, formed in place and in its
own dtype, so that no fp32 dW exists; dx is summed in fp32. No gradient is left out, however small (Cut Cross
Entropy's filter, arXiv 2411.09009, section 4.3, is biased while the model is young).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchkernels.flops import register_flops
from patchkernels.linear_parts import (
    add_product,
    logits_buffer,
    slice_dlogits,
    slice_statistics_,
    unit_scale,
    without_autocast,
)
from patchkernels.patch_cross_entropy import LossOptions, check_range, row_losses
from patchkernels.patch_embedding import accumulation_dtype


def low_memory_losses(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    needs: list[bool],  # gradients of x, weight, bias
    options: LossOptions,
    logits_bytes: int | None,
    backend: str,
) -> Tensor:  # l (N, K)
    """The losses of all targets, unweighted, in fp32 (fp64 for fp64)."""
    # with the statistics about 1 % of 16-bit logits; a slice below 1 MiB would be too thin to multiply well
    budget = logits_bytes or max(2 * len(x) * len(weight) // 128, 2**20)
    # eager code holds a slice's softcap slope and, for 16 bits, its fp32 copy beside it
    size = x.element_size() if backend == "triton" else x.element_size() + 8 * (x.element_size() == 2)
    size *= 2 if backend == "eager" and options.softcap is not None else 1
    columns = slice_columns(len(weight), len(x) * size, budget)
    losses: Tensor = _LowMemoryLosses.apply(x, weight, bias, target, needs, options, columns, backend)[0]
    return losses


def slice_columns(vocab: int, column_bytes: int, budget: int) -> int:
    """Classes a slice: as many as the budget holds, in multiples of 128 where it holds so many, else of 16."""
    most = max(budget // max(column_bytes, 1), 1)
    unit = 128 if most >= 128 else 16
    return min(max(most // unit, 1) * unit, vocab)


class _LowMemoryLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        needs: list[bool],
        options: LossOptions,
        columns: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.patchkernels.linear_low_memory
        losses, lse = op(x, weight, bias, target, *options, columns, backend)
        return losses, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, target, ctx.needs, ctx.options, ctx.columns, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, target, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, lse = ctx.saved_tensors
        op = torch.ops.patchkernels.linear_low_memory_backward
        grads = op(grad, x, weight, bias, target, lse, ctx.needs, *ctx.options, ctx.columns, ctx.backend)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs)), *(None,) * 5


@torch.library.custom_op("patchkernels::linear_low_memory", mutates_args=())
@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    columns: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # l (N, K), lse (N)
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    if backend == "eager":
        check_range(target, len(weight), ignore_index)
    dtype = accumulation_dtype(x.dtype)
    target = target.contiguous()
    statistics = x.new_zeros(3, len(x), dtype=dtype)  # max z, sum exp(z - max), sum z
    statistics[0] = -torch.inf
    picked = x.new_zeros(target.shape, dtype=dtype)
    for first, z in _slices(x, weight, bias, columns, backend):
        slice_statistics_(z, first, target, statistics, picked, options, backend)
    largest, total, sum_z = statistics
    lse = largest + total.log()
    return row_losses(lse, picked, sum_z / len(weight), target, len(weight), options), lse


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    columns: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(target.shape, dtype=dtype), x.new_empty(target.shape[:1], dtype=dtype)


@torch.library.custom_op("patchkernels::linear_low_memory_backward", mutates_args=())
@without_autocast
def _backward(
    grad: Tensor,  # (N, K), dL/dl
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,  # (N)
    needs: list[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # dx (N, D), dW (V, D), db (V) in the dtype of x; empty if not needed
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    scale, c = unit_scale(grad)
    target, vocab = target.contiguous(), len(weight)
    dtype = accumulation_dtype(x.dtype)
    dx, dw, db = _gradients(x, weight, needs)
    sum_dx = x.new_zeros(dx.shape, dtype=dtype)
    for first, z in _slices(x, weight, bias, columns, backend):
        classes = slice(first, first + z.shape[1])
        dz = slice_dlogits(z, first, vocab, target, c, lse, options, backend)
        if needs[0]:
            add_product(sum_dx, dz, weight[classes])
        if needs[1]:
            torch.mm(dz.T, x, out=dw[classes])
            dw[classes] *= scale
        if needs[2]:
            db[classes] = dz.sum(0, dtype=dtype) * scale
    return (sum_dx.mul_(scale).to(x.dtype) if needs[0] else dx), dw, db


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    needs: list[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, needs)


def _gradients(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        x.new_empty(weight.shape if needs[1] else (0,)),
        x.new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


def _forward_flops(x_shape: Any, w_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """``2 N V D``: the logits."""
    return int(2 * x_shape[0] * x_shape[1] * w_shape[0])


def _backward_flops(
    grad: Any, x: Any, w: Any, bias: Any, target: Any, lse: Any, needs: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """``2 N V D`` for the logits again, and as much for dx and for dW."""
    return _forward_flops(x, w) * int(1 + needs[0] + needs[1])


register_flops(torch.ops.patchkernels.linear_low_memory, _forward_flops)
register_flops(torch.ops.patchkernels.linear_low_memory_backward, _backward_flops)


def _slices(x: Tensor, weight: Tensor, bias: Tensor | None, columns: int, backend: str) -> Iterator[tuple[int, Tensor]]:
    """(first class, logits (N, v)) over the vocabulary; the logits are one buffer, overwritten by the next slice."""
    buffer = logits_buffer(len(x), weight[:columns], backend)
    for first in range(0, len(weight), columns):
        part = weight[first : first + columns]
        z = buffer[:, : len(part)]
        if bias is None:
            torch.mm(x, part.T, out=z)
        else:
            torch.addmm(bias[first : first + columns], x, part.T, out=z)
        yield first, z
