"""The patch step of a Hugging Face model: its own forward on mean embeddings, with the K-token loss as its loss.

The mixins here are put before the class of the model, and before that of its PEFT wrapper if it has one, by
:func:`patchkernels.hf.enable`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from patchkernels.hf.class_swap import SwappedClass
from patchkernels.hf.modules import (
    LossHeadMixin,
    PatchEmbeddingMixin,
    PatchSettings,
    PatchState,
    PatchStep,
    patch_means,
    runs_forward_of,
)
from patchkernels.numerics import IGNORE_INDEX, check_patch_size
from patchkernels.ops.patch_cross_entropy import patch_cross_entropy
from patchkernels.ops.targets import mask_document_starts, next_patch_targets

NO_CLASS = -1  # a target outside every vocabulary: on a GPU its loss is NaN


class PatchSizeError(ValueError):
    """A batch that cannot be cut into patches."""


class PatchSizeMixin(SwappedClass):
    """Gives a model or its PEFT wrapper the property ``patch_size``."""

    @property
    def patch_size(self) -> int:
        settings: PatchSettings = self._patch_state.settings
        return settings.patch_size

    @patch_size.setter
    def patch_size(self, value: int) -> None:
        check_patch_size(value)
        self._patch_state.settings.patch_size = value


class PatchStepMixin(PatchSizeMixin):
    """Makes a model's forward a patch step if ``patch_size > 1`` or the batch has ``shift_labels`` (B, P, K)."""

    _patch_parameters: tuple[str, ...]  # names of the parameters of the original forward, in order

    @classmethod
    def attributes_for(cls, original_class: Any) -> dict[str, Any]:
        """A forward with the signature of the original one, because ``generate`` and ``Trainer`` inspect it."""

        @functools.wraps(original_class.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return PatchStepMixin.forward(self, *args, **kwargs)

        parameters = tuple(inspect.signature(original_class.forward).parameters)[1:]
        return {"forward": forward, "_patch_parameters": parameters}

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        state: PatchState = self._patch_state
        if state.step is None:
            original: Callable[..., Tensor] = super().loss_function  # type: ignore[misc]
            return original
        return functools.partial(patch_loss, state.settings, state.step)

    @loss_function.setter
    def loss_function(self: Any, value: Any) -> None:
        self._loss_function = value

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original_forward = super().forward  # type: ignore[misc]
        state: PatchState = self._patch_state
        kwargs.update(zip(self._patch_parameters, args))
        shift_labels: Any = kwargs.get("shift_labels")
        brings_patches = shift_labels is not None and shift_labels.ndim == 3
        if not brings_patches and (state.settings.patch_size == 1 or kwargs.get("past_key_values") is not None):
            return original_forward(**kwargs)
        patch_size = shift_labels.shape[2] if brings_patches else state.settings.patch_size
        ids, target = take_tokens(kwargs, patch_size, brings_patches)
        target = convert_mask_and_positions(kwargs, ids, target, patch_size)
        kwargs["inputs_embeds"] = embed_patches(self.get_input_embeddings(), ids, patch_size)
        # Labels make the model call its loss function. Their values are not read there: the step holds the targets.
        kwargs["labels"] = target[..., 0].contiguous()
        kwargs.setdefault("use_cache", False)
        head = self.get_output_embeddings()
        # An adapter that was put around the head after enabling needs the head's logits.
        fused = isinstance(head, LossHeadMixin) and runs_forward_of(head, nn.Linear)
        state.step = step = PatchStep(target, fused)
        try:
            output = original_forward(**kwargs | {"return_dict": True})
        finally:
            state.step = None
        step.loss = None  # the caller has it; kept here, it would keep its graph alive
        state.last_step = step
        if fused:
            output.logits = None
        return output


def take_tokens(kwargs: dict[str, Any], patch_size: int, brings_patches: bool) -> tuple[Tensor, Tensor]:
    """Takes token ids and labels out of the arguments of a forward: ids (B, T) and targets (B, P, K)."""
    ids: Tensor | None = kwargs.pop("input_ids", None)
    labels: Tensor | None = kwargs.pop("labels", None)
    target: Any = kwargs.pop("shift_labels", None)
    if ids is None:
        raise PatchSizeError("a patch step needs input_ids; embeddings of tokens cannot be told from those of patches")
    if brings_patches:
        if ids.ndim != 2 or (len(ids), ids.shape[1]) != (len(target), target.shape[1] * patch_size):
            raise PatchSizeError(
                f"shift_labels (B, P, K) need input_ids (B, P K), got {tuple(target.shape)} and {tuple(ids.shape)}"
            )
        return ids, target
    if labels is None:
        raise PatchSizeError("a patch step needs labels; for logits or generation set model.patch_size = 1")
    if ids.ndim != 2 or ids.shape[1] % patch_size or labels.shape != ids.shape:
        raise PatchSizeError(
            f"a patch step needs input_ids and labels (B, T) with T divisible by patch_size={patch_size}, "
            f"got {tuple(ids.shape)} and {tuple(labels.shape)}"
        )
    return ids, next_patch_targets(labels, patch_size)


def convert_mask_and_positions(kwargs: dict[str, Any], ids: Tensor, target: Tensor, patch_size: int) -> Tensor:
    """Replaces ``attention_mask`` and ``position_ids`` with those of patches; returns the targets that remain.

    No row predicts the first patch of a document, since the patch before it belongs to another document.
    """
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"], padded_left = patch_mask(kwargs["attention_mask"], ids, patch_size)
        message = "a patch step takes right padding: left padding shifts the patches"
        target = reject_rows(target, padded_left, message)
    if kwargs.get("position_ids") is not None:
        positions, misaligned = patch_positions(kwargs["position_ids"], patch_size)
        message = f"documents of position_ids must begin on patch boundaries, multiples of {patch_size} tokens"
        target = reject_rows(target, misaligned, message)
        kwargs["position_ids"] = positions
        begins = positions.reshape(-1, *positions.shape[-2:])[0] == 0  # of several kinds of positions, the first
        target = mask_document_starts(target, begins)
    return target


def patch_mask(attention_mask: Tensor, input_ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Turns a mask of tokens (B, T) into one of patches (B, P), and says which rows (B) are padded on the left.

    A patch is attended to if its first token is.
    """
    if attention_mask.shape != input_ids.shape:
        raise PatchSizeError(
            f"a patch step takes an attention_mask of the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    padded_left = (attention_mask[:, 1:] > attention_mask[:, :-1]).any(1)
    return attention_mask[:, ::patch_size].contiguous(), padded_left


def patch_positions(position_ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Turns positions of tokens (..., T) into those of patches (..., P). Both count from 0 in every document.

    The second result, of shape (1), says whether a document begins inside a patch.
    """
    positions = position_ids.unflatten(-1, (-1, patch_size)) // patch_size
    first: Tensor = positions[..., 0]
    return first, (positions != first.unsqueeze(-1)).any().view(1)


def reject_rows(target: Tensor, rejected: Tensor, message: str) -> Tensor:
    """Raises ``PatchSizeError`` if a row (B or 1) is rejected.

    On a GPU, where reading ``rejected`` would wait for the device, the loss becomes NaN instead: rejected rows get
    targets outside the vocabulary.
    """
    if rejected.device.type == "cpu":
        if bool(rejected.any()):
            raise PatchSizeError(message)
        return target
    return target.masked_fill(rejected.view(-1, 1, 1), NO_CLASS)


def embed_patches(embedding: Any, ids: Tensor, patch_size: int) -> Tensor:
    """Maps token ids (B, T) to the mean embeddings of patches (B, P, D)."""
    is_swapped = isinstance(embedding, PatchEmbeddingMixin)
    if not is_swapped:
        # A class of the model's own, or an adapter that was put around the embedding after enabling. Its output is
        # averaged, not its weight: it may scale the embeddings or add to them.
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
    **__: Any,
) -> Tensor:
    """Replaces the model's ``loss_function`` in a patch step.

    ``num_items_in_batch`` is the Trainer's count of targets in all the batches of an optimizer step. With it, the loss
    is multiplied by this batch's number of targets and divided by that count, so that the batches add up to a mean.
    """
    loss: Any = step.loss
    if not step.fused:
        loss, step.losses = patch_cross_entropy(
            logits,
            step.target,
            reduction=settings.reduction,
            label_smoothing=settings.label_smoothing,
            return_losses=True,
        )
    if num_items_in_batch is not None:
        loss = loss * (step.target != IGNORE_INDEX).sum() / num_items_in_batch
    result: Tensor = loss
    return result
