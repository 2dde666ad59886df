"""The embedding and the head of a Hugging Face model in a patch step, and the state that they share with the model.

The mixins here are put before the classes of the two modules by :func:`patchkernels.hf.enable`. Outside of a patch step
the modules do what they did before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from patchkernels.hf.class_swap import SwappedClass
from patchkernels.ops.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.ops.patch_embedding import patch_embedding


class LogitMap(NamedTuple):
    """How a model makes logits of its head's output z: ``softcap tanh(scale z / softcap)``, or ``scale z``."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass
class PatchSettings:
    """The settings of an enabled model."""

    patch_size: int = 1  # for batches with labels; shift_labels (B, P, K) have their own, K
    reduction: str = "mean"
    label_smoothing: float = 0.0
    logit_map: LogitMap | None = None  # None: the loss cannot be computed in the head


@dataclass
class PatchStep:
    """One call of a model's forward on patches."""

    target: Tensor  # (B, P, K)
    fused: bool  # whether the head computes the loss in place of logits
    loss: Tensor | None = None  # computed by the head, until the model's loss function returns it
    losses: Tensor | None = None  # (B, P, K), of every target, without gradient; 0 where ignored


@dataclass
class PatchCalls:
    """The calls of a model by one thread."""

    step: PatchStep | None = None
    last_step: PatchStep | None = None


class ThreadCalls(threading.local):
    """The :class:`PatchCalls` of the thread that asks."""

    def __init__(self) -> None:
        self.calls = PatchCalls()


class PatchState:
    """The state that an enabled model shares with its embedding, its head and PEFT's wrapper.

    The settings are those of the model. The steps are those of the calling thread, so that several threads can run
    one model. A copy has settings of its own and no steps.
    """

    def __init__(self, settings: PatchSettings) -> None:
        self.settings = settings
        self._threads = ThreadCalls()

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def step(self) -> PatchStep | None:
        """The patch step that runs, None outside of one."""
        return self._threads.calls.step

    @step.setter
    def step(self, value: PatchStep | None) -> None:
        self._threads.calls.step = value

    @property
    def last_step(self) -> PatchStep | None:
        """The last patch step that ended, for logging the loss of each slot."""
        return self._threads.calls.last_step

    @last_step.setter
    def last_step(self, value: PatchStep | None) -> None:
        self._threads.calls.last_step = value


class PatchEmbeddingMixin(SwappedClass):
    """Makes an ``nn.Embedding`` return the means of patches if its caller passes a patch size."""

    def forward(self: Any, input: Tensor, patch_size: int = 1) -> Tensor:
        """Maps token ids (B, T) to embeddings (B, T / patch_size, D), without keeping those of the single tokens."""
        if patch_size == 1:
            embedded: Tensor = super().forward(input)  # type: ignore[misc]
            return embedded
        if isinstance(self.weight, DTensor) and self.weight.placements != (Shard(0),):
            # The operator does not take a table that is sharded by columns, so here all embeddings are kept.
            return patch_means(super().forward(input), patch_size)  # type: ignore[misc]
        weight = self.weight if self.padding_idx is None else WithoutRowGradient.apply(self.weight, self.padding_idx)
        means: Tensor = patch_embedding(input, weight, patch_size)
        return means


class LossHeadMixin(SwappedClass):
    """Makes an ``nn.Linear`` compute the loss in a fused patch step, in place of logits that are never kept."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss of a fused step in the shape of a single logit, which the model may then scale or cap.

        The loss is stored here, before the model does so, but after the hooks of this module have run, because FSDP2
        starts the backward of the head in a hook on the head's output.
        """
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        step: PatchStep | None = self._patch_state.step
        if step is not None and step.fused:
            step.loss = output.reshape(())
        return output

    def forward(self: Any, input: Tensor) -> Tensor:
        """Maps hidden states (B, P, D) to logits (B, P, V), or in a fused patch step to the loss (1, 1, 1)."""
        settings: PatchSettings = self._patch_state.settings
        step: PatchStep | None = self._patch_state.step
        if step is None or not step.fused:
            logits: Tensor = super().forward(input)  # type: ignore[misc]
            return logits
        if step.losses is not None:
            raise RuntimeError("the model called its head twice in a patch step, which computes one loss there")
        assert settings.logit_map is not None
        scale, softcap = settings.logit_map
        loss, step.losses = linear_patch_cross_entropy(
            input * scale if scale != 1 else input,
            self.weight,
            step.target,
            linear_bias=None if self.bias is None else self.bias * scale,
            softcap=softcap,
            reduction=settings.reduction,
            label_smoothing=settings.label_smoothing,
            return_losses=True,
        )
        output: Tensor = loss.reshape(1, 1, 1).clone()  # a copy, because FSDP2 warns of views
        return output


class WithoutRowGradient(torch.autograd.Function):
    """The weight itself, with a gradient of 0 in one row.

    The row is that of the padding token: it takes part in the means but, as in ``nn.Embedding``, has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None


def patch_means(embedded: Tensor, patch_size: int) -> Tensor:
    """The means of patches (B, T / patch_size, D) of embeddings of tokens (B, T, D)."""
    means: Tensor = embedded.unflatten(1, (-1, patch_size)).mean(2)
    return means


def runs_forward_of(module: Any, cls: type[nn.Module]) -> bool:
    """Whether calling the module runs the forward of ``cls`` (``nn.Linear``, ``nn.Embedding``), our mixins aside."""
    if not isinstance(module, cls) or "forward" in module.__dict__:
        return False
    candidates = (c for c in type(module).__mro__ if "forward" in c.__dict__ and not issubclass(c, SwappedClass))
    return next(candidates, None) is cls


def has_foreign_hooks(module: Any) -> bool:
    """Whether hooks read or change what the module returns, or the gradient of that.

    In a patch step such a hook on the head would receive the loss, and one on the embedding the means of patches. The
    hooks of torch.distributed, as of FSDP2, do not mind.
    """
    hooks: tuple[Iterable[Any], ...] = (
        module._forward_hooks.values(),
        module._backward_hooks.values(),
        module._backward_pre_hooks.values(),
    )
    return any(not module_of(hook).startswith("torch.distributed") for group in hooks for hook in group)


def module_of(function: Any) -> str:
    """The name of the module that defines a function, a method, a partial call or the class of a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", ""))
