"""The peers: functions of other libraries, and plain PyTorch code from papers, that do the work of our operators.

A peer that cannot run is a :class:`Missing` with the reason, which the benchmark lists.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Missing:
    """Stands for a peer that cannot run here."""

    reason: str


def optional(distribution: str, module: str) -> Any:
    """The module of a distribution, or why it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Missing(f"{distribution} cannot be imported: {error}")


def on_gpu(distribution: str, module: str, device: torch.device, majors: range | None = None) -> Any:
    """The module of a distribution that needs a GPU, or why it is missing.

    ``majors`` are the major numbers of the compute capabilities that it has kernels for; None: all.
    """
    found = optional(distribution, module)
    if isinstance(found, Missing):
        return found
    if device.type != "cuda":
        return Missing(f"{distribution} needs a CUDA GPU")
    if majors is not None and torch.cuda.get_device_capability()[0] not in majors:
        return Missing(f"{distribution} has no kernels for compute capability {torch.cuda.get_device_capability()}")
    return found


def bind(found: Any, make: Callable[[Any], Callable[..., Any]]) -> Any:
    """``make(found)``, or ``found`` itself if it is :class:`Missing`."""
    return found if isinstance(found, Missing) else make(found)


# K-token losses of given logits. Each takes logits (N, V) and target (N, K).


def patch_train(logits: Tensor, target: Tensor) -> Tensor:
    """PatchTrain's loss (arXiv 2407.12665): one log-softmax in fp32, one nll_loss a slot."""
    log_p = F.log_softmax(logits.float(), -1)
    return torch.stack([F.nll_loss(log_p, t) for t in target.T]).mean()


def dense_targets(logits: Tensor, target: Tensor) -> Tensor:
    """PyTorch's cross entropy against a distribution over the vocabulary, which is built for every row of a batch."""
    share = torch.full((), 1 / target.shape[1], dtype=logits.dtype, device=logits.device)
    dense = torch.zeros_like(logits).scatter_add_(1, target, share.expand_as(target))
    return F.cross_entropy(logits, dense)


def liger_cross_entropy(device: torch.device) -> Any:
    """Liger's cross entropy, which takes one target per row, called once per slot."""

    def make(liger: Any) -> Callable[..., Tensor]:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            # Liger writes the gradient over its input, so every call needs a copy of the logits.
            return torch.stack([liger.liger_cross_entropy(logits.clone(), t) for t in target.T]).mean()

        return loss

    return bind(on_gpu("liger-kernel", "liger_kernel.transformers.functional", device), make)


# Losses with the head fused in. Each takes input (N, D), weight (V, D) and target (N, K).


def patch_train_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """A matrix product, then PatchTrain's loss."""
    return patch_train(x @ weight.T, target)


def rows_repeated(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Turns a loss of one target per row into one of K targets per row: every row is repeated K times."""

    def repeated(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        slots = target.shape[1]
        return loss(x if slots == 1 else x.repeat_interleave(slots, 0), weight, target.flatten())

    return repeated


def linear_losses(device: torch.device) -> dict[str, Any]:
    """Every peer, computing K targets per row in the best way that it offers."""
    chunked: Any = Missing("F.linear_cross_entropy came with torch 2.13")
    whole = chunked
    if hasattr(F, "linear_cross_entropy"):
        whole = rows_repeated(F.linear_cross_entropy)
        options = torch.nn.LinearCrossEntropyOptions()
        chunked = rows_repeated(lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options))
    liger = on_gpu("liger-kernel", "liger_kernel.transformers.functional", device)
    apple = on_gpu("cut-cross-entropy", "cut_cross_entropy", device)
    quack = on_gpu("quack-kernels", "quack.linear_cross_entropy", device, range(9, 13))
    megatron = on_gpu("megatron-core", "megatron.core.fusions.fused_linear_cross_entropy", device, range(10, 11))
    return {
        "PatchTrain": patch_train_linear,
        "PatchTrain, compiled": torch.compile(patch_train_linear, dynamic=False),
        "F.linear_cross_entropy": whole,
        "F.linear_cross_entropy, chunked": chunked,
        "Liger": bind(liger, lambda m: rows_repeated(m.liger_fused_linear_cross_entropy)),
        "CCE": bind(apple, lambda m: _cut_cross_entropy(m.linear_cross_entropy)),
        "QuACK": bind(quack, lambda m: rows_repeated(m.chunked_linear_cross_entropy)),
        "Megatron": bind(megatron, lambda m: rows_repeated(m.linear_cross_entropy)),
    }


def _cut_cross_entropy(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """CCE's loss for K targets per row: ``lse - x . mean_k W[t_k]``, without its filter of small gradients.

    CCE gives ``lse - x . W[t_0]``, the loss of the first target; the difference is added with plain PyTorch.
    """

    def shared(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        first = loss(x, weight, target[:, 0], filter_eps=None)
        if target.shape[1] == 1:
            return first
        mean = F.embedding_bag(target, weight, mode="mean")
        return first + (x * (F.embedding(target[:, 0], weight) - mean)).sum(-1, dtype=torch.float32).mean()

    return shared


# Patch embedding. Each takes ids (N, K) and weight (V, D).


def embedding_mean(ids: Tensor, weight: Tensor) -> Tensor:
    """Looks every token up, (N, K, D), and takes the mean of each patch."""
    return F.embedding(ids, weight).mean(-2)


def embedding_bag(ids: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's fused look-up and mean."""
    return F.embedding_bag(ids, weight, mode="mean")
