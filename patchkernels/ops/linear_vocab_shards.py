"""The fused linear loss on a head whose rows, the vocabulary, are sharded over processes (Megatron-LM's layout).

Every process r holds the same input and targets, and the head's rows of its own classes. For each chunk of rows of the
input it computes

    z_r = x W_r^T;   max over ranks;   sum over ranks of [sum exp(z - max), sum z, the targets' z];   z_r -> dz_r

``dx = sum over ranks of dz_r W_r`` is reduced once for all rows, and ``dW_r = dz_r^T x`` needs no communication. The
two reductions of a chunk of n rows carry ``(3 + K) n`` numbers, whatever V is. K targets need no more reductions than
one target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import LOSS_OPTIONS, LossOptions, accumulation_dtype, row_losses
from patchkernels.ops.backend import implementation
from patchkernels.ops.flop_formulas import linear_flops, register_flops
from patchkernels.ops.linear_buffers import add_product, chunk_rows, logits_chunks, new_outputs, without_autocast
from patchkernels.ops.vocab_shard import VocabShard, max_, process_group, sum_


@torch.library.custom_op(
    "patchkernels::linear_vocab_parallel",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? c, bool[] needs, "
    f"SymInt first, SymInt vocab, str group, SymInt logits_bytes, str backend, {LOSS_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast()
def _losses_and_gradients(
    x: Tensor,  # (N, D), the same on all ranks
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r)
    target: Tensor,  # (N, K), classes of the whole vocabulary
    c: Tensor | None,  # (N, K), dL/dl; None: the losses alone
    needs: list[bool],  # gradients of x, weight, bias
    first: int,
    vocab: int,
    group: str,
    logits_bytes: int,
    backend: str,
    *loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # l (N, K), dx (N, D), dW_r and db_r in fp32; empty if not needed
    options, shard = LossOptions(*loss_options), VocabShard(first, vocab, group)
    cross_entropy = implementation("cross_entropy", backend)
    need_dx, need_dw, need_db = needs
    losses, dx, dw, db = new_outputs(x, weight, bias, target, c, needs)
    dx.zero_(), dw.zero_(), db.zero_()
    target = target.contiguous()
    cross_entropy.check_targets(target, vocab, options.ignore_index)
    # The largest shard decides the size of the chunks, so that it is the same on all ranks.
    largest_shard = -(-vocab // process_group(group).size())
    chunk = chunk_rows(len(x), largest_shard * x.element_size(), logits_bytes)
    buffer = cross_entropy.logits_buffer(min(chunk, len(x)), weight)
    for rows, z in logits_chunks(x, weight, bias, chunk, buffer):
        lse, picked, mean = _statistics(z, target[rows], shard, options, cross_entropy)
        losses[rows] = row_losses(lse, picked, mean, target[rows], vocab, options)
        if c is None or not len(weight):
            continue
        dz = cross_entropy.slice_gradient_(z, first, vocab, target[rows], c[rows], lse, options)
        if need_dx:
            torch.mm(dz, weight, out=dx[rows])
        if need_dw:
            add_product(dw, dz.T, x[rows])
        if need_db:
            db += dz.sum(0, dtype=db.dtype)
    if c is not None and need_dx:
        sum_(dx, group)
    return losses, dx, dw, db


_losses_and_gradients.register_fake(new_outputs)
register_flops(torch.ops.patchkernels.linear_vocab_parallel, linear_flops)


def _statistics(
    z: Tensor,  # (n, V_r)
    target: Tensor,  # (n, K)
    shard: VocabShard,
    options: LossOptions,
    cross_entropy: Any,  # the backend's module of this name
) -> tuple[Tensor, Tensor, Tensor]:  # lse (n), the logits of the targets (n, K), the mean logit (n)
    """The statistics of rows over all shards. The logits stay unchanged."""
    local = z.new_zeros(3, len(z), dtype=accumulation_dtype(z.dtype))
    local[0] = -torch.inf
    picked = z.new_zeros(target.shape, dtype=local.dtype)
    if z.shape[1]:
        cross_entropy.slice_statistics_(z, shard.first, target, local, picked, options, keep_logits=True)
    largest = max_(local[0].clone(), shard.group)
    shift = (local[0] - largest).nan_to_num(nan=-torch.inf)  # -inf - -inf is NaN
    sums = torch.cat([(local[1] * shift.exp()).unsqueeze(1), local[2].unsqueeze(1), picked], 1)
    sum_(sums, shard.group)
    return largest + sums[:, 0].log(), sums[:, 2:], sums[:, 1] / shard.vocab
