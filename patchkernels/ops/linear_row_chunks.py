"""The fused linear loss by chunks of rows, each as large as the budget for its logits allows.

A chunk takes one pass over its logits, which become dlogits in place, and three matrix products:

    z = x W^T;   z -> l, dz;   dx = dz W;   dW += dz^T x   (summed in fp32, cast once)

If there is one chunk, dz can be kept for the backward, where dx and dW are one product each, and the upstream gradient
is a factor of x and dx instead of dW. This is also done for a head whose rows, the vocabulary, are sharded over
processes (:mod:`patchkernels.ops.linear_vocab_shards`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import LOSS_OPTIONS, LossOptions, accumulation_dtype
from patchkernels.ops import linear_vocab_shards
from patchkernels.ops.backend import implementation
from patchkernels.ops.flop_formulas import gradients_flops, loss_flops, losses_flops, register_flops
from patchkernels.ops.linear_buffers import (
    add_product,
    chunk_rows,
    logits_chunks,
    multiply,
    power_of_two_scale,
    without_autocast,
)
from patchkernels.ops.registration import fake, operator
from patchkernels.ops.vocab_shard import VocabShard, process_group, sum_

SETTINGS = f"SymInt first, SymInt vocab, str group, SymInt logits_bytes, str backend, {LOSS_OPTIONS}"


def rows_of_a_chunk(x: Tensor, weight: Tensor, shard: VocabShard, logits_bytes: int) -> int:
    """The number of rows whose logits fit. The largest shard decides, so that it is the same on all ranks."""
    columns = -(-shard.vocab // process_group(shard.group).size()) if shard.group else len(weight)
    return chunk_rows(len(x), columns * x.element_size(), logits_bytes)


@operator(
    f"linear_losses(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? c, bool[] needs, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
@without_autocast
def linear_losses(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    needs: list[bool],  # gradients of x, weight, bias
    *settings: Any,
) -> tuple[Tensor, ...]:  # l (N, K), dx (N, D), dW (V, D) and db (V) in fp32; empty if not needed
    losses, _, *gradients = _losses_and_gradients(x, weight, bias, target, c, needs, False, *settings)
    return losses, *gradients


@operator(
    "linear_loss(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? target_weight, str reduction, "
    f"bool every_loss, bool[] needs, bool keep, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
@without_autocast
def linear_loss(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    target_weight: Tensor | None,  # (K) or (N, K)
    reduction: str,
    every_loss: bool,  # also of targets of weight 0
    needs: list[bool],  # gradients of x, weight, bias
    keep: bool,  # dlogits for the backward, instead of gradients; there must be one chunk
    *settings: Any,
) -> tuple[Tensor, ...]:  # loss (), l (N, K), scale () in fp16, dlogits (N, V), dx (N, D), dW (V, D), db (V) in fp32
    *_, backend, ignore_index, _, _, _ = settings
    dtype = accumulation_dtype(x.dtype)
    targets = implementation("targets", backend)
    target, c = targets.coefficients(target, target_weight, ignore_index, reduction, every_loss, dtype)
    scale, scaled_c = x.new_empty(0, dtype=dtype), c
    if x.dtype == torch.float16 and any(needs):
        scale, scaled_c = power_of_two_scale(c)
    given_c = scaled_c if any(needs) else None
    losses, *gradients = _losses_and_gradients(x, weight, bias, target, given_c, needs, keep, *settings)
    return targets.weighted_sum(losses, c), losses, scale, *gradients


def _losses_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    c: Tensor | None,
    needs: Sequence[bool],
    keep: bool,
    first: int,
    vocab: int,
    group: str,
    logits_bytes: int,
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, ...]:  # l (N, K), dlogits (N, V), dx (N, D), dW (V, D) and db (V) in fp32
    options, shard = LossOptions(*loss_options), VocabShard(first, vocab, group)
    cross_entropy = implementation("cross_entropy", backend)
    need_dx, need_dw, need_db = (c is not None and needed and not keep for needed in needs)
    losses, dlogits, dx, dw, db = _outputs(x, weight, target, (need_dx, need_dw, need_db), keep, backend)
    target = target.contiguous()
    cross_entropy.check_targets(target, vocab, options.ignore_index)
    chunk = rows_of_a_chunk(x, weight, shard, logits_bytes)
    buffer = dlogits if keep else cross_entropy.logits_buffer(min(chunk, len(x)), weight)
    if not len(x):
        dw.zero_(), db.zero_()
    for rows, z in logits_chunks(x, weight, bias, chunk, buffer):
        row_c = None if c is None else c[rows]
        if group:
            losses[rows], dz = linear_vocab_shards.loss_and_gradient_(
                z, target[rows], row_c, shard, options, cross_entropy
            )
        else:
            dz = cross_entropy.loss_and_gradient_(z, target[rows], row_c, losses[rows], options)
        if dz is None:
            continue
        if need_dx:
            torch.mm(dz, weight, out=dx[rows])
        if need_dw:
            (add_product if rows.start else multiply)(dw, dz.T, x[rows])
        if need_db:
            db.copy_(dz.sum(0, dtype=db.dtype) + (db if rows.start else 0))
    if need_dx and group:
        sum_(dx, group)
    return losses, dlogits, dx, dw, db


def _outputs(
    x: Tensor, weight: Tensor, target: Tensor, needs: Sequence[bool], keep: bool, backend: str
) -> tuple[Tensor, ...]:
    """Memory for the results of :func:`_losses_and_gradients`; what is not needed is empty."""
    dtype = accumulation_dtype(x.dtype)
    need_dx, need_dw, need_db = needs
    return (
        x.new_empty(target.shape, dtype=dtype),
        implementation("cross_entropy", backend).logits_buffer(len(x), weight) if keep else x.new_empty(0),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw else (0,), dtype=dtype),
        x.new_empty(weight.shape[:1] if need_db else (0,), dtype=dtype),
    )


@fake("linear_losses")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, c: Tensor | None, needs: list[bool], *settings: Any
) -> tuple[Tensor, ...]:
    backend = settings[4]
    losses, _, *gradients = _outputs(x, weight, target, [c is not None and n for n in needs], False, backend)
    return losses, *gradients


@fake("linear_loss")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    reduction: str,
    every_loss: bool,
    needs: list[bool],
    keep: bool,
    *settings: Any,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(x.dtype)
    scale = x.new_empty(() if x.dtype == torch.float16 and any(needs) else (0,), dtype=dtype)
    losses, *gradients = _outputs(x, weight, target, [n and not keep for n in needs], keep, settings[4])
    return x.new_empty((), dtype=dtype), losses, scale, *gradients


@operator(
    "linear_gradients(Tensor upstream, Tensor scale, Tensor dlogits, Tensor dx, Tensor dw, Tensor db, Tensor? x, "
    "Tensor? weight, bool[] needs, str group, str backend, ScalarType x_dtype, ScalarType weight_dtype, "
    "ScalarType bias_dtype) -> (Tensor, Tensor, Tensor)"
)
@without_autocast
def linear_gradients(
    upstream: Tensor,  # ()
    scale: Tensor,  # () in fp16, else empty
    dlogits: Tensor,  # (N, V) if they were kept, else dx, dw and db
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    x: Tensor | None,  # (N, D), with dlogits
    weight: Tensor | None,  # (V, D), with dlogits
    needs: list[bool],
    group: str,
    backend: str,
    *dtypes: torch.dtype,  # of the gradients
) -> tuple[Tensor, ...]:  # dx (N, D), dW (V, D), db (V), empty if not needed
    scaling = implementation("scaling", backend)
    scale = upstream * scale if scale.numel() else upstream
    if x is None or weight is None:
        sums = (dx, dw, db)
        results = (g.new_empty(g.shape, dtype=dtype) for g, dtype in zip(sums, dtypes))
        return tuple(scaling.scale_into(result, g, scale) for result, g in zip(results, sums))
    need_dx, need_dw, need_db = needs
    dx, dw, db = _new_gradients(x, weight, needs, dtypes)
    if need_dw and (torch.float16 in (x.dtype, dw.dtype) or not _in_one_product(x, dw)):
        # The unscaled sums may be beyond 65504, and scaled factors too small.
        scaling.scale_into(dw, _product_in_fp32(dlogits.T, x), scale)
    elif need_dw:
        memory = dx if dx.shape == x.shape and dx.dtype == x.dtype else x.new_empty(x.shape)
        multiply(dw, dlogits.T, scaling.scale_into(memory, x, scale))
    if need_dx and _in_one_product(x, dx):
        multiply(dx, dlogits, weight)
        if group:
            sum_(dx, group)
        scaling.scale_(dx, scale)
    elif need_dx:
        sum_dx = _product_in_fp32(dlogits, weight)
        if group:
            sum_(sum_dx, group)
        scaling.scale_into(dx, sum_dx, scale)
    if need_db:
        scaling.scale_into(db, dlogits.sum(0, dtype=scale.dtype), scale)
    return dx, dw, db


def _in_one_product(factor: Tensor, gradient: Tensor) -> bool:
    """Whether a product of factors of this dtype can have the dtype of the gradient, which it has but for autocast."""
    return gradient.dtype in (factor.dtype, torch.float32, torch.float64)


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(len(a), b.shape[1], dtype=torch.float32, device=a.device)
    multiply(out, a, b)
    return out


def _new_gradients(
    x: Tensor, weight: Tensor, needs: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (x.new_empty(s if n else (0,), dtype=d) for s, n, d in zip(shapes, needs, dtypes))
    return dx, dw, db


@fake("linear_gradients")
def _(
    upstream: Tensor,
    scale: Tensor,
    dlogits: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    needs: list[bool],
    group: str,
    backend: str,
    *dtypes: torch.dtype,
) -> tuple[Tensor, ...]:
    if x is None or weight is None:
        return tuple(gradient.new_empty(gradient.shape, dtype=dtype) for gradient, dtype in zip((dx, dw, db), dtypes))
    return _new_gradients(x, weight, needs, dtypes)


register_flops(torch.ops.patchkernels.linear_losses, losses_flops)
register_flops(torch.ops.patchkernels.linear_loss, loss_flops)
register_flops(torch.ops.patchkernels.linear_gradients, gradients_flops)
