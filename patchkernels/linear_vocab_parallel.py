"""The fused linear loss on a head whose rows, the vocabulary, are sharded over processes (Megatron-LM's layout).

Every process holds the same input and targets and its own classes. A chunk of rows is

    z_r = x W_r^T;   max over ranks;   sum over ranks of [sum exp(z - max), sum z, the targets' z];   z_r -> dz_r

and ``dx = sum over ranks of dz_r W_r`` is taken once for all rows; ``dW_r = dz_r^T x`` stays where it is. The two
reductions of a chunk carry ``(3 + K) n`` numbers, whatever V is; K targets need no more of them than one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkernels.flops import register_flops
from patchkernels.linear_parts import (
    add_product,
    chunk_rows,
    linear_flops,
    linear_outputs,
    logits_buffer,
    slice_dlogits,
    slice_statistics_,
    without_autocast,
)
from patchkernels.parallel import max_, resolve, sum_
from patchkernels.patch_cross_entropy import LossOptions, check_range, row_losses
from patchkernels.patch_embedding import accumulation_dtype


@torch.library.custom_op("patchkernels::linear_vocab_parallel", mutates_args=())
@without_autocast
def _linear(
    x: Tensor,  # (N, D), the same on all ranks
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r)
    target: Tensor,  # (N, K), classes of the whole vocabulary
    c: Tensor | None,  # (N, K), dL/dl; None: losses only
    needs: list[bool],  # gradients of x, weight, bias
    first: int,
    vocab: int,
    group: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    logits_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # l (N, K), dx (N, D), dW_r and db_r in fp32; empty if not needed
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss_weight)
    losses, dx, dw, db = linear_outputs(x, weight, target, c, needs)
    dx.zero_(), dw.zero_(), db.zero_()
    target = target.contiguous()
    if backend == "eager":
        check_range(target, vocab, ignore_index)
    shard = -(-vocab // resolve(group).size())  # of an even division: all ranks take chunks of the same rows
    chunk = chunk_rows(len(x), shard * x.element_size(), logits_bytes)
    buffer = logits_buffer(min(chunk, len(x)), weight, backend)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        z = buffer[: len(x[rows])]
        torch.mm(x[rows], weight.T, out=z) if bias is None else torch.addmm(bias, x[rows], weight.T, out=z)
        lse, picked, mean = _statistics(z, first, vocab, target[rows], group, options, backend)
        losses[rows] = row_losses(lse, picked, mean, target[rows], vocab, options)
        if c is None or not len(weight):
            continue
        dz = slice_dlogits(z, first, vocab, target[rows], c[rows], lse, options, backend)
        if needs[0]:
            torch.mm(dz, weight, out=dx[rows])
        if needs[1]:
            add_product(dw, dz.T, x[rows])
        if needs[2]:
            db += dz.sum(0, dtype=db.dtype)
    if c is not None and needs[0]:
        sum_(dx, group)
    return losses, dx, dw, db


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    c: Tensor | None,
    needs: list[bool],
    first: int,
    vocab: int,
    group: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    logits_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_outputs(x, weight, target, c, needs)


def _statistics(
    z: Tensor, first: int, vocab: int, target: Tensor, group: str, options: LossOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``lse (n)``, the targets' logits ``(n, K)`` and the mean logit ``(n)`` over all shards."""
    local = z.new_zeros(3, len(z), dtype=accumulation_dtype(z.dtype))
    local[0] = -torch.inf
    picked = z.new_zeros(target.shape, dtype=local.dtype)
    if z.shape[1]:
        kept = z.clone() if backend == "eager" else z
        slice_statistics_(kept, first, target, local, picked, options, backend)
    largest = max_(local[0].clone(), group)
    shift = (local[0] - largest).nan_to_num(nan=-torch.inf)  # -inf - -inf
    sums = torch.cat([(local[1] * shift.exp()).unsqueeze(1), local[2].unsqueeze(1), picked], 1)
    sum_(sums, group)
    return largest + sums[:, 0].log(), sums[:, 2:], sums[:, 1] / vocab


register_flops(torch.ops.patchkernels.linear_vocab_parallel, linear_flops)
