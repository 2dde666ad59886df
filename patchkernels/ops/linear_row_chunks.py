"""The fused linear loss by chunks of rows, each as large as the budget for its logits allows.

A chunk takes three matrix products and one pass over its logits, which become dlogits in place:

    z = x W^T;   z -> l, dz;   dx = dz W;   dW += dz^T x   (summed in fp32, cast once by the caller)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import LOSS_OPTIONS, LossOptions
from patchkernels.ops.backend import implementation
from patchkernels.ops.flop_formulas import linear_flops, register_flops
from patchkernels.ops.linear_buffers import add_product, chunk_rows, logits_chunks, new_outputs, without_autocast


@torch.library.custom_op(
    "patchkernels::linear_patch_cross_entropy",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? c, bool[] needs, SymInt logits_bytes, "
    f"str backend, {LOSS_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast()
def _losses_and_gradients(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, K)
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    needs: list[bool],  # gradients of x, weight, bias
    logits_bytes: int,
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # l (N, K), dx (N, D), dW (V, D) and db (V) in fp32; empty if not needed
    options = LossOptions(*loss_options)
    cross_entropy = implementation("cross_entropy", backend)
    need_dx, need_dw, need_db = needs
    losses, dx, dw, db = new_outputs(x, weight, bias, target, c, needs)
    dw.zero_(), db.zero_()
    cross_entropy.check_targets(target, len(weight), options.ignore_index)
    chunk = chunk_rows(len(x), len(weight) * x.element_size(), logits_bytes)
    buffer = cross_entropy.logits_buffer(min(chunk, len(x)), weight)
    for rows, z in logits_chunks(x, weight, bias, chunk, buffer):
        row_c = None if c is None else c[rows]
        dz = cross_entropy.loss_and_gradient_(z, target[rows], row_c, losses[rows], options)
        if dz is None:
            continue
        if need_dx:
            torch.mm(dz.to(x.dtype), weight, out=dx[rows])
        if need_dw:
            add_product(dw, dz.T, x[rows])
        if need_db:
            db += dz.sum(0, dtype=db.dtype)
    return losses, dx, dw, db


_losses_and_gradients.register_fake(new_outputs)
register_flops(torch.ops.patchkernels.linear_patch_cross_entropy, linear_flops)
