"""What :func:`patchkernels.hf.enable` mixes into the modules of a Hugging Face model: its embedding and its head.

An instance's class is exchanged for a subclass of it under the same name, so that hooks, parameters, ``state_dict``,
``isinstance``, deepcopy and pickling go on as before; outside a patch step the modules do what they did.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from patchkernels.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.patch_embedding import patch_embedding


class LogitMap(NamedTuple):
    """What a model makes of ``lm_head``'s logits: ``softcap * tanh(scale z / softcap)``, or ``scale z`` without."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass
class Step:
    """What a model, its embedding and its head share: settings, and during a patch step what they tell each other."""

    patch_size: int = 1  # of batches that bring labels, not patches of them
    reduction: str = "mean"
    label_smoothing: float = 0.0
    map: LogitMap | None = None  # None: materialised
    embedding_size: int = 1  # K while the embedding averages
    target: Tensor | None = None  # (B, P, K) while the model runs a patch step
    fused: bool = False  # the head takes the loss
    loss: Tensor | None = None  # what the head found
    losses: Tensor | None = None  # (B, P, K), of the last patch step, without gradient; 0 where ignored
    counted: Tensor | None = None  # (B, P, K), which of them are not ignored


class Mixed:
    """Mixed in before a module's own class, which is ``_patch_own``."""

    _patch: Step

    @classmethod
    def names(cls, own: Any) -> dict[str, Any]:
        """What else the mixed class holds."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Unlike its class, which was made here, the class that the module had can be found by pickle."""
        cls: Any = type(self)
        return rebuild, (cls._patch_own, cls._patch_mixin), self.__dict__.copy()

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel runs replicas in threads, which share a patch step; run one process a GPU (torchrun)"
        )


class MeanEmbedding(Mixed):
    """An ``nn.Embedding`` that gives the means of K embeddings in a patch step, the embeddings never kept."""

    def forward(self: Any, input: Tensor) -> Tensor:
        size = self._patch.embedding_size
        other = isinstance(self.weight, DTensor) and self.weight.placements != (Shard(0),)  # sharded by columns
        if size == 1 or other:
            out: Tensor = super().forward(input)  # type: ignore[misc]
            return out
        weight = self.weight if self.padding_idx is None else WithoutGradientAt.apply(self.weight, self.padding_idx)
        means: Tensor = patch_embedding(input, weight, size)
        return means


class LossHead(Mixed):
    """An ``nn.Linear`` that gives the loss in a fused patch step, shaped like one logit."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the model makes of that logit is no loss; the loss is what has been through the head's hooks (FSDP2)."""
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self._patch.fused:
            self._patch.loss = out.reshape(())
        return out

    def forward(self: Any, input: Tensor) -> Tensor:
        step = self._patch
        if not step.fused:
            out: Tensor = super().forward(input)  # type: ignore[misc]
            return out
        scale, softcap = step.map
        loss, step.losses = linear_patch_cross_entropy(
            input * scale if scale != 1 else input,
            self.weight,
            step.target,
            linear_bias=None if self.bias is None else self.bias * scale,
            softcap=softcap,
            reduction=step.reduction,
            label_smoothing=step.label_smoothing,
            return_losses=True,
        )
        logit: Tensor = loss.reshape(1, 1, 1).clone()  # FSDP2 warns of views
        return logit


class WithoutGradientAt(torch.autograd.Function):
    """The weight itself; its row ``index``, padding, takes part in means and has no gradient, as in nn.Embedding."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: int) -> Tensor:
        ctx.index = index
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.index] = 0
        return grad, None


def is_plain(module: Any, own: type[nn.Module]) -> bool:
    """Whether calling the module runs the forward of ``own`` (nn.Linear, nn.Embedding) and nothing else."""
    if not isinstance(module, own) or "forward" in module.__dict__:
        return False
    cls = next((c for c in type(module).__mro__ if "forward" in c.__dict__ and not issubclass(c, Mixed)), None)
    return cls is own


@functools.cache
def mixed(own: Any, mixin: Any) -> Any:
    """``own`` with ``mixin`` before it, under the same name: that is what ``save_pretrained`` writes."""
    names = {
        "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__,
        "_patch_own": own, "_patch_mixin": mixin,
    }  # fmt: skip
    return type(own.__name__, (mixin, own), names | mixin.names(own))


def exchange(module: Any, mixin: Any, step: Step) -> None:
    own: Any = type(module)
    module.__class__ = mixed(own, mixin)
    module._patch = step


def restore(module: Any) -> None:
    if isinstance(module, Mixed):
        module.__class__ = type(module)._patch_own  # type: ignore[attr-defined]
        del module._patch


def rebuild(own: Any, mixin: Any) -> Any:
    cls = mixed(own, mixin)
    return cls.__new__(cls)
