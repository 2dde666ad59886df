"""The patch step of a Hugging Face model: its own forward on mean embeddings, with the K-token loss as its loss.

The mixins here are put before the class of the model, and before that of its PEFT wrapper if it has one, by
:func:`patchkernels.hf.enable`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchkernels.hf.class_swap import SwappedClass
from patchkernels.hf.modules import (
    STAND_IN,
    LossHeadMixin,
    PatchEmbeddingMixin,
    PatchSettings,
    PatchState,
    PatchStep,
    has_foreign_hooks,
    patch_means,
    runs_forward_of,
)
from patchkernels.hf.patch_arguments import WAY_OUT, PatchSizeError, convert_arguments, patch_size_of, reject
from patchkernels.numerics import IGNORE_INDEX, check_patch_size
from patchkernels.ops.patch_cross_entropy import patch_cross_entropy


class PatchSizeMixin(SwappedClass):
    """Gives a model or its PEFT wrapper the property ``patch_size``."""

    @property
    def patch_size(self) -> int:
        state: PatchState = self._patch_state
        return state.patch_size

    @patch_size.setter
    def patch_size(self, value: int) -> None:
        check_patch_size(value)
        self._patch_state.settings.patch_size = value


class PatchStepMixin(PatchSizeMixin):
    """Makes a model's forward a patch step if ``patch_size > 1`` or the batch has ``shift_labels`` (B, P, K)."""

    _patch_positional: tuple[str, ...]  # names of the positional parameters of the original forward
    _patch_optional: tuple[str, ...]  # which of "use_cache" and "return_dict" it takes

    @classmethod
    def attributes_for(cls, original_class: Any) -> dict[str, Any]:
        """A forward with the signature of the original one, because ``generate`` and ``Trainer`` inspect it."""

        @functools.wraps(original_class.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return PatchStepMixin.forward(self, *args, **kwargs)

        parameters = list(inspect.signature(original_class.forward).parameters.values())[1:]
        names = {p.name for p in parameters}
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        return {
            "forward": forward,
            "_patch_positional": tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD),
            "_patch_optional": tuple(name for name in ("use_cache", "return_dict") if takes_any or name in names),
        }

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        state: PatchState = self._patch_state
        if state.step is None:
            original: Callable[..., Tensor] = super().loss_function  # type: ignore[misc]
            return original
        return functools.partial(patch_loss, state.settings, state.step)

    @loss_function.setter
    def loss_function(self: Any, value: Any) -> None:
        raise ValueError("the loss of an enabled model cannot be changed: set it after hf.disable, and enable it again")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: PatchState = self._patch_state
        kwargs.update(named(args, kwargs, self._patch_positional))
        patch_size = patch_size_of(kwargs, state.patch_size, type(self).__name__)
        step = None if patch_size is None else self._begin_patch_step(kwargs, patch_size)
        as_tuple = step is not None and not self._wants_dict(kwargs)
        outer, state.step = state.step, step  # a hook may call the model inside a step of its own
        try:
            output = super().forward(**kwargs)  # type: ignore[misc]
        finally:
            state.step = outer
        if step is None:
            return output
        step.loss = None  # the caller has it; kept here, it would keep its graph alive
        state.last_step = step
        if step.fused:
            output = type(output)(**{**output, "logits": None})
        if not as_tuple or isinstance(output, tuple):
            return output
        rest = [value for name, value in output.items() if name not in ("loss", "logits") and value is not None]
        return output.loss, output.logits, *rest

    def _begin_patch_step(self: Any, kwargs: dict[str, Any], patch_size: int) -> PatchStep:
        """Turns the arguments of the forward into those of a patch step."""
        ids, target = convert_arguments(kwargs, patch_size)
        kwargs["inputs_embeds"] = embed_patches(self.get_input_embeddings(), ids, patch_size)
        # Labels make the model call its loss function. Their values are not used there: the step holds the targets.
        kwargs["labels"] = target[..., 0].contiguous()
        if "use_cache" in self._patch_optional:
            kwargs["use_cache"] = False
        return PatchStep(target, can_fuse(self.get_output_embeddings(), self._patch_state), kwargs["labels"])

    def _wants_dict(self: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the caller wants a ``ModelOutput``, which the model's own forward is asked for in any case."""
        asked = kwargs.get("return_dict")
        if "return_dict" in self._patch_optional:
            kwargs["return_dict"] = True
        return bool(getattr(self.config, "return_dict", True) if asked is None else asked)


def named(args: tuple[Any, ...], kwargs: dict[str, Any], parameters: tuple[str, ...]) -> dict[str, Any]:
    """The positional arguments of a call by their names."""
    if len(args) > len(parameters):
        raise TypeError(f"forward takes {len(parameters)} arguments by position, got {len(args)}")
    twice = [name for name in parameters[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"forward got several values for {', '.join(twice)}")
    return dict(zip(parameters, args))


def can_fuse(head: Any, state: PatchState) -> bool:
    """Whether the head of an enabled model can compute the loss in this step.

    Not so for a head around which an adapter was put after enabling, or which has hooks: these need logits.
    """
    is_own = isinstance(head, LossHeadMixin) and head._patch_state is state
    return is_own and runs_forward_of(head, nn.Linear) and not has_foreign_hooks(head)


def embed_patches(embedding: Any, ids: Tensor, patch_size: int) -> Tensor:
    """Maps token ids (B, T) to the mean embeddings of patches (B, P, D)."""
    averages_itself = isinstance(embedding, PatchEmbeddingMixin)
    if not averages_itself or has_foreign_hooks(embedding):
        # A class of the model's own, an adapter that was put around the embedding after enabling, or a hook. Its output
        # is averaged, not its weight: it may scale the embeddings or add to them.
        return patch_means(embedding(ids), patch_size)
    means: Tensor = embedding(ids, patch_size=patch_size)
    return means


def patch_loss(
    settings: PatchSettings,
    step: PatchStep,
    logits: Tensor,
    labels: Tensor,
    *_: Any,
    num_items_in_batch: Any = None,
    **others: Any,
) -> Tensor:
    """Replaces the model's ``loss_function`` in a patch step.

    ``num_items_in_batch`` is the Trainer's count of targets in all the batches of an optimizer step. With it, the loss
    is multiplied by this batch's number of targets and divided by that count, so that the batches add up to a mean.

    Raises:
        PatchSizeError: the model does something else than in the steps that :func:`patchkernels.hf.enable` has seen.
    """
    if step.has_called_loss:
        raise PatchSizeError("the model calls its loss function twice; a patch step has one loss")
    step.has_called_loss = True
    for name, value in others.items():
        is_default = value is None or value is False or (name, value) == ("ignore_index", IGNORE_INDEX)
        if settings.loss_options.takes(name) and not is_default:
            raise PatchSizeError(f"the loss of a patch step takes no {name}; {WAY_OUT}")
    loss: Any = step.loss
    if step.fused and loss is None:
        raise PatchSizeError("the model calls its loss function before its head")
    if not step.fused:
        loss, step.losses = patch_cross_entropy(
            logits,
            step.target,
            reduction=settings.reduction,
            label_smoothing=settings.label_smoothing,
            return_losses=True,
        )
    loss = checked(loss, settings, step, logits, labels)
    if num_items_in_batch is not None:
        items = (
            num_items_in_batch.clamp(min=1) if isinstance(num_items_in_batch, Tensor) else max(num_items_in_batch, 1)
        )
        loss = loss * (step.target != IGNORE_INDEX).sum() / items
    result: Tensor = loss
    return result


def checked(loss: Tensor, settings: PatchSettings, step: PatchStep, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss, if the model gave its loss function the labels and, in a fused step, the logits that it should."""
    if labels is not step.labels:
        differ = labels.shape != step.labels.shape or (labels != step.labels).any()
        loss = reject(loss, differ, "the model changes the labels before it gives them to its loss function")
    if step.fused:
        assert settings.logit_map is not None
        expected = settings.logit_map(torch.full_like(logits, STAND_IN))
        tolerance = 1e-4 if logits.dtype == torch.float32 else 2e-2
        differ = logits.shape != (1, 1, 1) or ((logits - expected).abs() > tolerance * expected.abs()).any()
        loss = reject(loss, differ, "the model changes its logits otherwise than when it was enabled")
    return loss
