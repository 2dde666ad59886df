"""The fused linear loss on a head whose rows, the vocabulary, are sharded over processes (Megatron-LM's layout).

Every process r holds the same input and targets, and the head's rows of its own classes. For each chunk of rows of the
input it computes

    z_r = x W_r^T;   max over ranks;   sum over ranks of [sum exp(z - max), sum (z - max), z of targets];   z_r -> dz_r

``dx = sum over ranks of dz_r W_r`` is reduced once for all rows, and ``dW_r = dz_r^T x`` needs no communication. The
two reductions of a chunk of n rows carry ``(3 + K) n`` numbers, whatever V is. K targets need no more reductions than
one target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkernels.numerics import LOSS_OPTIONS, LossOptions, accumulation_dtype, new_statistics, row_losses
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
        statistics, picked = _statistics(z, target[rows], shard, options, cross_entropy)
        losses[rows] = row_losses(statistics, picked, target[rows], vocab, options)
        if c is None or not len(weight):
            continue
        dz = cross_entropy.slice_gradient_(z, first, vocab, target[rows], c[rows], statistics[:2], options)
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
) -> tuple[Tensor, Tensor]:  # (3, n) and the logits of the targets (n, K), as of :func:`numerics.new_statistics`
    """The statistics of rows over all shards. The logits stay unchanged."""
    local, picked = new_statistics(target, accumulation_dtype(z.dtype))
    columns = z.shape[1]
    if columns:
        cross_entropy.slice_statistics_(z, shard.first, target, local, picked, options, keep_logits=True)
    local_largest, total, below = local
    largest = max_(local_largest.clone(), shard.group)
    # How far the maximum moves; by 0 where this shard's is -inf, whose sums are 0 or -inf, since -inf - -inf is NaN.
    moved = (local_largest - largest).masked_fill_(local_largest == -torch.inf, 0)
    sums = torch.cat([(total * moved.exp()).unsqueeze(1), (below + columns * moved).unsqueeze(1), picked], 1)
    sum_(sums, shard.group)
    return torch.stack([largest, sums[:, 0], sums[:, 1]]), sums[:, 2:]
