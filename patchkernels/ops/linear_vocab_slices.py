"""The fused linear loss in the least memory, by slices of the vocabulary: ``memory="low"``.

The logits exist for a few classes of all rows at a time:

    forward    z_s = x W_s^T;   updates max, sum exp(z - max) and z[target] of each row      1 product
    backward   z_s = x W_s^T;   dz_s in place;   dW_s = dz_s^T x;   dx += dz_s W_s           3 products

Only the max and the sum of exponentials of each row are kept from the forward for the backward. A slice of dW is one
product, written in place in the dtype of dW, so that no fp32 dW exists (in fp16 one slice of it does, since its
unscaled values may overflow); dx is summed in fp32. No gradient is left out, however small: the filter of Cut Cross
Entropy (arXiv 2411.09009, section 4.3) is biased early in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import LOSS_OPTIONS, LossOptions, accumulation_dtype, new_statistics, row_losses
from patchkernels.ops.backend import implementation
from patchkernels.ops.derivatives import Function, first_derivative_only
from patchkernels.ops.flop_formulas import logits_flops, register_flops, slices_backward_flops
from patchkernels.ops.linear_buffers import add_product, multiply, multiply_into, power_of_two_scale, without_autocast
from patchkernels.ops.registration import fake, operator
from patchkernels.ops.tied import is_tied, mark_owned

SMALLEST_SLICE_BYTES = 2**20  # matrix products with a smaller slice are slow
# On a GPU also those with fewer columns: x and the sum of dx are read for each slice, which then takes longer.
FEWEST_COLUMNS = {"cuda": 2048}


def vocab_slice_losses(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    needs: list[bool],  # gradients of x, weight, bias
    options: LossOptions,
    logits_bytes: int | None,  # None: 1/128 of 2 N V bytes, or 1 MiB or FEWEST_COLUMNS if that is more
    backend: str,
) -> Tensor:  # l (N, K)
    """The losses of all targets, unweighted, in fp32 (fp64 for fp64)."""
    fewest_columns = x.element_size() * len(x) * FEWEST_COLUMNS.get(x.device.type, 0)
    slice_bytes = logits_bytes or max(2 * len(x) * len(weight) // 128, SMALLEST_SLICE_BYTES, fewest_columns)
    losses: Tensor = _VocabSliceLosses.apply(x, weight, bias, target, needs, options, slice_bytes, backend)[0]
    return losses


def slice_columns(vocab: int, column_bytes: int, budget: int) -> int:
    """The number of classes of a slice: as many as the budget holds, but at least ``min(16, V)``.

    It is a multiple of 128 if the budget holds so many, else of 16.
    """
    most = max(budget // max(column_bytes, 1), 1)
    multiple = 128 if most >= 128 else 16
    return min(max(most // multiple, 1) * multiple, vocab)


class _VocabSliceLosses(Function):
    """``l (N, K)`` and statistics ``(2, N)``; the backward computes the logits once more."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        needs: list[bool],
        options: LossOptions,
        slice_bytes: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _forward(x, weight, bias, target, slice_bytes, backend, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, target, ctx.needs, ctx.options, ctx.slice_bytes, ctx.backend = inputs
        _, statistics = output
        ctx.tied = is_tied(weight)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(x, weight, bias, target, statistics)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = _backward(grad, *ctx.saved_tensors, ctx.needs, ctx.slice_bytes, ctx.backend, *ctx.options)
        if ctx.tied:
            mark_owned(grads[1])
        return *(g if needed else None for g, needed in zip(grads, ctx.needs)), *(None,) * 5


@operator(
    "linear_low_memory(Tensor x, Tensor weight, Tensor? bias, Tensor target, SymInt slice_bytes, str backend, "
    f"{LOSS_OPTIONS}) -> (Tensor, Tensor)"
)
@without_autocast
def _forward(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    slice_bytes: int,  # the budget for the logits of a slice
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor]:  # l (N, K); max z and sum exp(z - max) (2, N)
    options, cross_entropy = LossOptions(*loss_options), implementation("cross_entropy", backend)
    cross_entropy.check_targets(target, len(weight), options.ignore_index)
    target = target.contiguous()
    statistics, picked = new_statistics(target, accumulation_dtype(x.dtype))
    for first, z in _slices(x, weight, bias, slice_bytes, options, cross_entropy):
        cross_entropy.slice_statistics_(z, first, target, statistics, picked, options, keep_logits=False)
    return row_losses(statistics, picked, target, len(weight), options), statistics[:2]


@operator(
    "linear_low_memory_backward(Tensor c, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor statistics, "
    f"bool[] needs, SymInt slice_bytes, str backend, {LOSS_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
@without_autocast
def _backward(
    c: Tensor,  # (N, K), dL/dl
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    statistics: Tensor,  # (2, N): max z, sum exp(z - max)
    needs: list[bool],  # gradients of x, weight, bias
    slice_bytes: int,  # the budget for the logits of a slice
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # dx (N, D), dW (V, D), db (V) in the dtype of x; empty if not needed
    options, cross_entropy = LossOptions(*loss_options), implementation("cross_entropy", backend)
    need_dx, need_dw, need_db = needs
    scale = None
    if x.dtype == torch.float16:
        scale, c = power_of_two_scale(c)
    target, vocab = target.contiguous(), len(weight)
    dtype = accumulation_dtype(x.dtype)
    dx, dw, db = _new_gradients(x, weight, needs)
    sum_dx = x.new_zeros(dx.shape, dtype=dtype)
    for first, z in _slices(x, weight, bias, slice_bytes, options, cross_entropy):
        classes = slice(first, first + z.shape[1])
        dz = cross_entropy.slice_gradient_(z, first, vocab, target, c, statistics, options)
        if need_dx:
            add_product(sum_dx, dz, weight[classes])
        if need_dw:
            _multiply_and_scale(dw[classes], dz.T, x, scale)
        if need_db:
            db[classes] = dz.sum(0, dtype=dtype) * (1 if scale is None else scale)
    if need_dx:
        dx = (sum_dx if scale is None else sum_dx.mul_(scale)).to(x.dtype)
    return dx, dw, db


def _multiply_and_scale(out: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> None:
    """``out = a @ b * scale``, in the dtype of ``out``.

    In fp16, which alone has a scale, the product may be beyond 65504 where the scaled product is not, so it is first
    taken in fp32.
    """
    if scale is None:
        torch.mm(a, b, out=out)
    else:
        product = out.new_empty(out.shape, dtype=torch.float32)
        multiply(product, a, b)
        out.copy_(product.mul_(scale))


def _slices(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    slice_bytes: int,
    options: LossOptions,
    cross_entropy: Any,  # the backend's module of this name
) -> Iterator[tuple[int, Tensor]]:
    """The first class of each slice and its logits, which lie in one buffer and are overwritten by the next slice's."""
    columns = slice_columns(len(weight), len(x) * cross_entropy.bytes_per_logit(x.dtype, options), slice_bytes)
    buffer = cross_entropy.logits_buffer(len(x), weight[:columns])
    for first in range(0, len(weight), columns):
        part = weight[first : first + columns]
        z = buffer[:, : len(part)]
        multiply_into(z, x, part, None if bias is None else bias[first : first + columns])
        yield first, z


def _new_gradients(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dw, need_db = needs
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw else (0,)),
        x.new_empty(weight.shape[:1] if need_db else (0,)),
    )


@fake("linear_low_memory")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(target.shape, dtype=dtype), x.new_empty((2, target.shape[0]), dtype=dtype)


@fake("linear_low_memory_backward")
def _(
    c: Tensor, x: Tensor, weight: Tensor, bias: Any, target: Tensor, statistics: Tensor, needs: list[bool], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(x, weight, needs)


register_flops(torch.ops.patchkernels.linear_low_memory, logits_flops)
register_flops(torch.ops.patchkernels.linear_low_memory_backward, slices_backward_flops)
