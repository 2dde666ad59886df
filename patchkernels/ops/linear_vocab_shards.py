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

from patchkernels.numerics import LossOptions, accumulation_dtype, new_statistics, row_losses
from patchkernels.ops.vocab_shard import VocabShard, max_, sum_


def loss_and_gradient_(
    z: Tensor,  # (n, V_r), of this process's classes
    target: Tensor,  # (n, K), classes of the whole vocabulary
    c: Tensor | None,  # (n, K), dL/dl; None: the losses alone
    shard: VocabShard,
    options: LossOptions,
    cross_entropy: Any,  # the backend's module of this name
) -> tuple[Tensor, Tensor | None]:  # l (n, K), dlogits (n, V_r)
    """The losses, and with ``c`` dlogits, which overwrite the logits."""
    statistics, picked = _statistics(z, target, shard, options, cross_entropy)
    losses = row_losses(statistics, picked, target, shard.vocab, options)
    if c is None or not z.shape[1]:
        return losses, None if c is None else z
    dz = cross_entropy.slice_gradient_(z, shard.first, shard.vocab, target, c, statistics[:2], options)
    return losses, dz if dz is z else z.copy_(dz)


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
