"""FlashAttention for the ledger: two operators without data that stand for its kernels.

FLOPs of causal attention are half of those of the full products: two of them forward, five backward (FlashAttention-2,
arXiv 2307.08691, section 4.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.ledger.operations import SPECIAL, Work, total_bytes
from patchkernels.model import attention


@torch.library.custom_op("ledger::flash_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # out (B, P, H, hd), lse (B, H, P)
    raise NotImplementedError("this operator has no data")


@torch.library.custom_op("ledger::flash_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("this operator has no data")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, positions, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, positions, dtype=torch.float32)


@_backward.register_fake
def _(upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.ledger.flash_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return torch.ops.ledger.flash_attention_backward(upstream, *ctx.saved_tensors)


def _causal_product(q: Tensor) -> int:
    batch, positions, heads, size = q.shape
    return batch * heads * positions**2 * size


def _forward_work(args: Any, kwargs: Any, result: Any) -> Work:
    return Work(total_bytes(args), total_bytes(result), 2 * _causal_product(args[0]))


def _backward_work(args: Any, kwargs: Any, result: Any) -> Work:
    """Three kernels: sums of ``out * upstream``, the gradients, and dq from its sum in fp32, which begins at 0."""
    upstream, q, _, _, out, _ = args
    sum_dq = 4 * q.numel()
    read = total_bytes(args) + total_bytes([upstream, out]) + 2 * sum_dq
    return Work(read, total_bytes(result) + 2 * sum_dq, 5 * _causal_product(q), launches=3)


SPECIAL["ledger::flash_attention"] = _forward_work
SPECIAL["ledger::flash_attention_backward"] = _backward_work


@contextlib.contextmanager
def counted_attention() -> Iterator[None]:
    """The model's attention is this one."""
    functions = attention.FlashFunctions(lambda q, k, v, causal: _FlashAttention.apply(q, k, v), packed=_refuse)
    with (
        mock.patch.object(attention, "_choose_cached", return_value="counted"),
        mock.patch.dict(attention._functions, {"counted": functions}),
    ):
        yield


def _refuse(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("packed documents are not counted")
