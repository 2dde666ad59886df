"""The embedding and the head of a Hugging Face model in a patch step, and the state that they share with the model.

The mixins here are put before the classes of the two modules by :func:`patchkernels.hf.enable`. Outside of a patch step
the modules do what they did before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from patchkernels.hf.class_swap import SwappedClass
from patchkernels.ops.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.ops.patch_embedding import patch_embedding

# What a loss function is given that is no option of the loss: its arguments, and those of the model's forward.
KNOWN_OPTIONS = {"logits", "labels", "vocab_size", "num_items_in_batch", "shift_labels", "return_dict", "use_cache",
                 "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # fmt: skip
STAND_IN = 1.0  # what a model is given in place of logits that are never computed


class LogitMap(NamedTuple):
    """How a model makes logits of its head's output z: ``softcap tanh(scale z / softcap)``, or ``scale z``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class LossOptions(NamedTuple):
    """The options of a model's loss function that a patch step does not take, as weights of classes."""

    names: frozenset[str] = frozenset()
    takes_any: bool = False

    def takes(self, name: str) -> bool:
        of_forward = name in KNOWN_OPTIONS or name.startswith("output_")
        return name in self.names or (self.takes_any and not of_forward)


def options_of(loss_function: Callable[..., Tensor]) -> LossOptions:
    """That of transformers takes any option, and ignores those that it does not name."""
    parameters = inspect.signature(loss_function).parameters
    names = {name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD} - KNOWN_OPTIONS
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return LossOptions(frozenset(names), takes_any and module_of(loss_function) != "transformers.loss.loss_utils")


@dataclass
class PatchSettings:
    """The settings of an enabled model."""

    patch_size: int = 1  # for batches with labels; shift_labels (B, P, K) have their own, K
    reduction: str = "mean"
    label_smoothing: float = 0.0
    logit_map: LogitMap | None = None  # None: the loss cannot be computed in the head
    loss_options: LossOptions = LossOptions()  # noqa: RUF009 (it is immutable)


@dataclass
class PatchStep:
    """One call of a model's forward on patches."""

    target: Tensor  # (B, P, K)
    fused: bool  # whether the head computes the loss in place of logits
    labels: Tensor  # (B, P), what the model was given as labels, and must give to its loss function
    loss: Tensor | None = None  # computed by the head, until the model's loss function returns it
    has_called_loss: bool = False
    losses: Tensor | None = None  # (B, P, K), of every target, without gradient; 0 where ignored


@dataclass
class PatchCalls:
    """The calls of a model by one thread."""

    step: PatchStep | None = None
    last_step: PatchStep | None = None
    token_level: int = 0  # how many blocks of hf.token_level the thread is in


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

    @property
    def patch_size(self) -> int:
        """That of the settings, or 1 inside of :func:`patchkernels.hf.token_level`."""
        return 1 if self._threads.calls.token_level else self.settings.patch_size

    @contextlib.contextmanager
    def token_level(self) -> Iterator[None]:
        """Makes the steps of the calling thread ordinary ones inside the block."""
        calls = self._threads.calls
        calls.token_level += 1
        try:
            yield
        finally:
            calls.token_level -= 1


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
        """In a fused step, keeps the loss and returns a number in the shape of a single logit.

        The model may scale or cap that number. Its loss function then compares it with what must come of it.
        The loss is kept after the hooks of this module have run, because FSDP2 starts the backward of the head in a
        hook on the head's output.
        """
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        step: PatchStep | None = self._patch_state.step
        if step is None or not step.fused:
            return output
        step.loss = output.reshape(()).clone()  # FSDP2 warns of views that a model returns
        return StandIn.apply(step.loss)

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
        output: Tensor = loss.reshape(1, 1, 1).clone()  # for the same reason
        return output


class StandIn(torch.autograd.Function):
    """The number ``STAND_IN`` (1, 1, 1) in place of logits that are never computed.

    Whoever differentiates it computes more of the logits than the loss that the head has computed already.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return torch.full((1, 1, 1), STAND_IN, dtype=loss.dtype, device=loss.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if grad.device.type == "cpu" and not torch.compiler.is_compiling():
            raise RuntimeError("the model uses the logits of a patch step for more than its loss function")
        return grad.new_full((), math.nan)


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
