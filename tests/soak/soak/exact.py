"""The operators in fp64, written from their equations alone, with simulated rounding.

In :data:`EXACT` arithmetic these functions are the definitions. In any other every intermediate value is moved by a
random amount within the rounding error of its dtype, and so is its gradient. The spread of such results is the
error that no implementation in these dtypes can avoid (Monte Carlo arithmetic: Parker, Pierce and Eggert, "Monte Carlo
arithmetic: how to gamble with floating point and win", 2000).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Arithmetic:
    """Values in fp64, moved by random relative errors of at most these sizes."""

    def __init__(
        self,
        stored: float = 0.0,  # of a rounding to the dtype of the tensors
        smallest: float = 0.0,  # the smallest normal number of that dtype
        summed: float = 0.0,  # of a rounding to the dtype of sums
        random: torch.Generator | None = None,  # None: no errors
        rows_alike: bool = False,  # the errors are the same in all rows
        tanh: float = 0.0,  # the absolute error of tanh
    ) -> None:
        self.stored, self.summed, self._smallest, self._random = stored, summed, smallest, random
        self._rows_alike, self._tanh = rows_alike, tanh
        self._largest_upstream = 1.0

    def factor(self, x: Tensor, size: float) -> Tensor:
        """Errors of at most this size for the elements of ``x``."""
        shape = (1, *x.shape[1:]) if self._rows_alike and x.ndim > 1 else x.shape
        return size * (2 * torch.rand(shape, generator=self._random, dtype=x.dtype) - 1)

    def store(self, x: Tensor) -> Tensor:
        """Rounded to the dtype of the tensors, and so is its gradient, which may be too small for the normal range."""
        if self._random is None:
            return x
        stored: Tensor = _Store.apply(x, self)
        return stored

    def below_normal(self, x: Tensor) -> Tensor:
        """Errors of values below the normal range, if they are stored with the largest upstream gradient as 1."""
        return self.factor(x, self.stored * self._smallest * self._largest_upstream)

    def watch_upstream(self, x: Tensor) -> Tensor:
        """The tensor itself, whose largest gradient above 1 is remembered."""

        def remember(grad: Tensor) -> None:
            self._largest_upstream = max(1.0, float(grad.abs().max()) if grad.numel() else 0.0)

        if x.requires_grad:
            x.register_hook(remember)
        return x

    def round(self, x: Tensor) -> Tensor:
        """Rounded to the dtype of sums, and so is its gradient."""
        return x if self._random is None else x * (1 + self.factor(x, self.summed))

    def exp(self, x: Tensor) -> Tensor:
        """The exponential; values below the normal range may become 0."""
        exponential: Tensor = _Exp.apply(x, self)
        return exponential

    def tanh(self, x: Tensor) -> Tensor:
        t = torch.tanh(x)
        return t if self._random is None else self.round(t) + self.factor(t, self._tanh)

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """The sum, rounded after each term."""
        total = x.sum(dim)
        if self._random is None:
            return total
        partial = torch.where(x != 0, x, 0).cumsum(dim).detach()
        errors = self.factor(x.flatten(), self.summed).reshape(x.shape) if dim == 0 else self.factor(x, self.summed)
        return total + torch.where(x.detach() != 0, partial * errors, 0).sum(dim)

    def pick(self, z: Tensor, column: Tensor) -> Tensor:
        """``z[n, column[n, k]]``; the gradients of equal columns are added up with rounding."""
        picked: Tensor = _Pick.apply(z, column, self)
        return picked

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product ``a b``, rounded after each term, and so are its gradients."""
        product: Tensor = _Product.apply(a, b, self)
        return product

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The vector ``x`` repeated along one dimension of a matrix; its gradient is rounded after each term."""
        spread: Tensor = _Spread.apply(x, shape, self)
        return spread


EXACT = Arithmetic()


class _Store(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.arithmetic = arithmetic
        return x * (1 + arithmetic.factor(x, arithmetic.stored))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        arithmetic = ctx.arithmetic
        return grad * (1 + arithmetic.factor(grad, arithmetic.stored)) + arithmetic.below_normal(grad), None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, column: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(column)
        ctx.vocab, ctx.arithmetic = z.shape[1], arithmetic
        return z.gather(1, column)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (column,) = ctx.saved_tensors
        onehot = F.one_hot(column, ctx.vocab)  # (N, K, V)
        return ctx.arithmetic.sum(grad.unsqueeze(2) * onehot, 1), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.arithmetic = arithmetic
        return arithmetic.sum(a.unsqueeze(2) * b.unsqueeze(0), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        grad_a = ctx.arithmetic.sum(grad.unsqueeze(1) * b.unsqueeze(0), 2)
        return grad_a, ctx.arithmetic.sum(a.unsqueeze(2) * grad.unsqueeze(1), 0), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, arithmetic: Arithmetic) -> Tensor:
        ctx.shape, ctx.arithmetic = x.shape, arithmetic
        return x.expand(shape).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dim = 1 if ctx.shape == (len(grad), 1) else 0
        return ctx.arithmetic.sum(grad, dim).reshape(ctx.shape), None, None


class _Exp(torch.autograd.Function):
    """``exp``, whose gradient is the rounded value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        # 2^-126, the smallest normal number of fp32, and 2^-1022, that of fp64
        smallest = 2.0**-126 if arithmetic.summed > 2**-50 else 2.0**-1022
        e = arithmetic.round(x.exp()) + arithmetic.factor(x, smallest) if arithmetic.summed else x.exp()
        ctx.save_for_backward(e)
        return e

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (e,) = ctx.saved_tensors
        return grad * e, None


class _Tanh(torch.autograd.Function):
    """``tanh`` whose gradient ``1 - t^2`` is taken of the rounded value ``t``, as every implementation does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        t = arithmetic.tanh(x)
        ctx.save_for_backward(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (t,) = ctx.saved_tensors
        return grad * (1 - t * t), None


def patch_embedding(
    ids: Tensor,  # (..., T)
    weight: Tensor,  # (V, D)
    patch_size: int,
    padding_idx: int | None,
    arithmetic: Arithmetic = EXACT,
) -> Tensor:  # (..., T / K, D)
    """The mean of the rows of a patch's tokens, padding left out; at K = 1 the padding row is read as a constant."""
    vocab = len(weight)
    padding = None if padding_idx is None else padding_idx % vocab
    patches = ids.long().reshape(-1, patch_size).tolist() if ids.numel() else []
    share = torch.zeros(len(patches), vocab, dtype=weight.dtype)  # of each row of the table in each patch
    for patch, shares in zip(patches, share):
        kept = [token for token in patch if token != padding]
        for token in kept:
            shares[token] += 1 / len(kept)
    out = arithmetic.product(share, weight)
    if patch_size == 1 and padding is not None:
        out = torch.where(ids.reshape(-1, 1) == padding, weight[padding].detach(), out)
    return out.reshape(*ids.shape[:-1], ids.shape[-1] // patch_size, weight.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic = EXACT) -> Tensor:
    """Logits ``x W^T + b``, rounded once to the dtype of the tensors."""
    z = arithmetic.product(x.reshape(-1, x.shape[-1]), weight.T)
    if bias is not None:
        z = z + arithmetic.spread(bias, z.shape)
    return arithmetic.store(z).reshape(*x.shape[:-1], len(weight))


def losses(
    z: Tensor,  # (N, V)
    target: Tensor,  # (N, K)
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss_weight: float,
    arithmetic: Arithmetic = EXACT,
) -> Tensor:  # (N, K)
    """``l = (1-e) (lse - z_t) + e (lse - mean_v z_v) + z_loss_weight lse^2``; 0 where the target is ignored."""
    rounded = arithmetic.round
    if softcap is not None:
        z = rounded(softcap * _Tanh.apply(rounded(z / softcap), arithmetic))
    valid = target != ignore_index
    largest = z.amax(1, keepdim=True).detach()
    total = arithmetic.sum(arithmetic.exp(rounded(z - largest)), 1)
    log = arithmetic.spread(rounded(total.log()).unsqueeze(1), target.shape)  # lse = largest + log
    picked = arithmetic.pick(z, torch.where(valid, target, 0))
    l = rounded(rounded(largest - picked) + log)  # noqa: E741
    if label_smoothing:
        mean = rounded(arithmetic.sum(z, 1).unsqueeze(1) / z.shape[1])
        uniform = rounded(rounded(largest - arithmetic.spread(mean, target.shape)) + log)
        l = rounded((1 - label_smoothing) * l) + rounded(label_smoothing * uniform)  # noqa: E741
    if z_loss_weight:
        l = l + rounded(z_loss_weight * rounded(largest + log) ** 2)  # noqa: E741
    return arithmetic.watch_upstream(torch.where(valid, rounded(l), 0))


def reduce(
    l: Tensor,  # (N, K)  # noqa: E741
    target: Tensor,  # (N, K)
    weight: Tensor | None,  # (K) or (N, K)
    ignore_index: int,
    reduction: str,
    arithmetic: Arithmetic = EXACT,
) -> Tensor:  # (N, K) or a scalar
    """The weighted loss. A mean whose weights are all 0 is 0; a mean over slots leaves out slots without targets."""
    rounded = arithmetic.round
    valid = target != ignore_index
    w = torch.ones_like(l, requires_grad=False) if weight is None else rounded(weight).expand(l.shape)
    if reduction == "slot_mean":
        total, total_weight = l.sum() * 0, 0.0
        for k in range(l.shape[1]):
            count = int(valid[:, k].sum())
            if count:
                total = total + rounded(w[0, k] * rounded(arithmetic.sum(l[:, k], 0) / count))
                total_weight = total_weight + w[0, k]
        return rounded(total / total_weight) if isinstance(total_weight, Tensor) and total_weight != 0 else total * 0
    w = torch.where(valid, w, 0)
    weighted = rounded(torch.where(w != 0, w * l, 0))
    if reduction == "none":
        return weighted
    total = arithmetic.sum(weighted.flatten(), 0)
    if reduction == "sum" or not bool((w != 0).any()):
        return total
    return rounded(total / rounded(arithmetic.sum(w.flatten(), 0)))


def next_patch_targets(labels: Tensor, patch_size: int, ignore_index: int) -> Tensor:
    """The labels of the next patch, token by token."""
    shape = (*labels.shape[:-1], labels.shape[-1] // patch_size, patch_size)
    rows = labels.reshape(-1, labels.shape[-1]).tolist() if labels.numel() else []
    shifted = [row[patch_size:] + [ignore_index] * patch_size for row in rows]
    return torch.tensor(shifted, dtype=labels.dtype).reshape(shape)
