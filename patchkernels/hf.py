"""Patch training in any causal language model of Hugging Face transformers: ``enable(model, patch_size=4)``.

A patch step is the model's own forward, with the mean of K embeddings as ``inputs_embeds`` and the K-token loss in
place of its loss. Where the logits that reach the model's ``loss_function`` are those of ``lm_head``, times a
constant or soft-capped, the loss is formed inside ``lm_head`` and the logits never exist ("fused"); elsewhere it is
formed from the logits that the model made of them ("materialised"). Which of the two is exact is found by running the
model when it is enabled: every token K times in patches must give the loss of the tokens once, one by one. A model
where neither does is refused.

The classes of the model, its embedding and its head are exchanged for subclasses of them, so that ``deepcopy``,
pickling, ``save_pretrained``, ``generate`` and ``state_dict`` keep working; :func:`disable` gives back
the very classes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from patchkernels.hf_modules import LossHead, MeanEmbedding, Mixed, Step, exchange, is_plain, restore
from patchkernels.hf_probe import inexactness, logit_map
from patchkernels.patch_cross_entropy import next_patch_targets, patch_cross_entropy

logger = logging.getLogger("patchkernels")
Model = TypeVar("Model", bound=nn.Module)

TRANSFORMERS = (5, 0)  # the oldest that is known to work


class PatchSizeError(ValueError):
    """A batch that cannot be cut into patches."""


def enable(model: Model, patch_size: int = 1, *, reduction: str = "mean", label_smoothing: float = 0.0) -> Model:
    """``model(input_ids, labels=labels)`` becomes a step on patches of ``patch_size`` tokens (PatchTrain, section 2).

    ``model.patch_size`` may be changed at any time; 1 is the model's ordinary step, untouched. A batch may also bring
    its patches itself: ``shift_labels`` of shape (B, P, K), as :func:`patchkernels.next_patch_targets` makes them, is a
    step on patches of K whatever ``model.patch_size`` is. The loss is the mean of all valid targets' losses, or
    ``reduction="slot_mean"``; with ``num_items_in_batch`` their sum over that number.

    In a patch step ``input_ids`` (B, T) and ``labels`` (B, T) are unshifted, T divisible by K; padding is on the
    right; packed documents (``position_ids``) begin on patch boundaries. The fused loss gives no logits.

    Args:
        model: a causal language model of transformers, or PEFT's wrapper of one.
        patch_size: K, at least 1.
        reduction: ``"mean"`` or ``"slot_mean"``, as :func:`patchkernels.patch_cross_entropy`.
        label_smoothing: of patch steps.

    Returns:
        the model itself.

    Raises:
        TypeError: not a causal language model of transformers: another class, no output head, an encoder-decoder.
        ValueError: K < 1, an unknown reduction, or a model in which no patch step is exact, with the reason.
        ImportError: transformers older than 5.0.
    """
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < TRANSFORMERS:
        raise ImportError(f"patchkernels.hf needs transformers >= 5.0, found {transformers.__version__}")
    patched = unwrap(model)
    name = type(patched).__name__
    if not isinstance(patched, transformers.PreTrainedModel):
        raise TypeError(f"expected a transformers PreTrainedModel, got {name}")
    if patched.config.is_encoder_decoder:
        raise TypeError(f"{name} is an encoder-decoder; patches need a causal language model")
    if not isinstance(patched.get_output_embeddings(), nn.Module):
        raise TypeError(f"{name} has no output head (get_output_embeddings() is {patched.get_output_embeddings()})")
    if reduction not in ("mean", "slot_mean"):
        raise ValueError(f"reduction must be 'mean' or 'slot_mean', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_patch_size(patch_size)
    enabled = isinstance(patched, PatchSteps)
    if not enabled:
        mix_in(patched, name)
    step: Any = patched._patch
    step.patch_size, step.reduction, step.label_smoothing = patch_size, reduction, label_smoothing
    if patched is not model and not isinstance(model, PatchSize):
        exchange(model, PatchSize, step)
    return model


def mix_in(model: Any, name: str) -> None:
    """Fused if that is exact, else materialised if that is; ValueError otherwise, and the model as it was."""
    step = Step()
    exchange(model, PatchSteps, step)
    try:
        embedding = model.get_input_embeddings()
        if is_plain(embedding, nn.Embedding) and embedding.max_norm is None and not embedding.scale_grad_by_freq:
            exchange(embedding, MeanEmbedding, step)
        step.map = logit_map(model)
        if step.map is not None:
            exchange(model.get_output_embeddings(), LossHead, step)
        reason = inexactness(model)
        if reason and step.map is not None:
            restore(model.get_output_embeddings())
            step.map = None
            reason = inexactness(model)
        if reason:
            raise ValueError(f"no patch step of {name} is exact: {reason}")
    except Exception:
        disable(model)
        raise
    if step.map is None:
        logger.warning("%s: the loss is formed from materialised logits, since it changes those of its head", name)


def disable(model: Model) -> Model:
    """Gives back the classes that the model and its modules had; without effect on one that is not enabled."""
    for module in (model, *model.modules()):
        restore(module)
    return model


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def token_level(model: Any) -> Iterator[None]:
    """``patch_size = 1`` inside the block: for evaluation in the patch phase."""
    before, model.patch_size = model.patch_size, 1
    try:
        yield
    finally:
        model.patch_size = before


def check_patch_size(value: int) -> None:
    if value < 1:
        raise ValueError(f"patch_size must be at least 1, got {value}")


class PatchSize(Mixed):
    """Mixed in before the class of a wrapper."""

    @property
    def patch_size(self) -> int:
        return self._patch.patch_size

    @patch_size.setter
    def patch_size(self, value: int) -> None:
        check_patch_size(value)
        self._patch.patch_size = value


class PatchSteps(PatchSize):
    """Mixed in before a model's own class."""

    _patch_arguments: tuple[str, ...]  # of the model's own forward, in order

    @classmethod
    def names(cls, own: Any) -> dict[str, Any]:
        """A forward with the signature of the model's own: generate and Trainer look there for what it takes."""

        @functools.wraps(own.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return PatchSteps.forward(self, *args, **kwargs)

        return {"forward": forward, "_patch_arguments": tuple(inspect.signature(own.forward).parameters)[1:]}

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        if self._patch.target is None:
            own: Callable[..., Tensor] = super().loss_function  # type: ignore[misc]
            return own
        return functools.partial(patch_loss, self._patch)

    @loss_function.setter
    def loss_function(self: Any, value: Any) -> None:
        self._loss_function = value

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = super().forward  # type: ignore[misc]
        kwargs.update(zip(self._patch_arguments, args))
        step: Step = self._patch
        target: Any = kwargs.get("shift_labels")
        brought = target is not None and target.ndim == 3
        if not brought and (step.patch_size == 1 or kwargs.get("past_key_values") is not None):
            return own(**kwargs)
        size = target.shape[2] if brought else step.patch_size
        ids: Tensor | None = kwargs.pop("input_ids", None)
        labels: Tensor | None = kwargs.pop("labels", None)
        kwargs.pop("shift_labels", None)
        if ids is None:
            raise PatchSizeError(
                "a patch step needs input_ids; embeddings of tokens cannot be told from those of patches"
            )
        if brought:
            if ids.ndim != 2 or (len(ids), ids.shape[1]) != (len(target), target.shape[1] * size):
                raise PatchSizeError(
                    f"shift_labels (B, P, K) need input_ids (B, P K), got {tuple(target.shape)} and {tuple(ids.shape)}"
                )
        else:
            if labels is None:
                raise PatchSizeError("a patch step needs labels; for logits or generation set model.patch_size = 1")
            if ids.ndim != 2 or ids.shape[1] % size or labels.shape != ids.shape:
                raise PatchSizeError(
                    f"a patch step needs input_ids and labels (B, T) with T divisible by patch_size={size}, "
                    f"got {tuple(ids.shape)} and {tuple(labels.shape)}"
                )
            target = next_patch_targets(labels, size)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"], left = patch_mask(kwargs["attention_mask"], ids, size)
            target = refuse(target, left, "a patch step takes right padding: left padding shifts the patches")
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"], astray = patch_positions(kwargs["position_ids"], size)
            target = refuse(
                target, astray, f"documents of position_ids must begin on patch boundaries, multiples of {size} tokens"
            )
            # a document's first patch is predicted by no other document
            begins = kwargs["position_ids"].reshape(-1, *kwargs["position_ids"].shape[-2:])[0][:, 1:] == 0
            begins = torch.nn.functional.pad(begins, (0, 1)).expand(len(target), -1)
            target = target.masked_fill(begins.unsqueeze(-1), -100)
        kwargs["inputs_embeds"] = self.patch_embeddings(ids, size)
        kwargs["labels"] = target[..., 0].contiguous()  # read by no one but to see that there are some
        kwargs.setdefault("use_cache", False)
        head = self.get_output_embeddings()
        step.target = target
        # an adapter put around the head since then wants its logits
        step.fused = step.map is not None and isinstance(head, LossHead) and is_plain(head, nn.Linear)
        fused = step.fused
        try:
            out = own(**kwargs | {"return_dict": True})
        finally:
            step.target, step.loss, step.fused = None, None, False
        step.counted = target != -100
        if fused:
            out.logits = None
        return out

    def patch_embeddings(self: Any, ids: Tensor, size: int) -> Tensor:
        """(B, P, D)"""
        embedding = self.get_input_embeddings()
        if isinstance(embedding, MeanEmbedding):  # and not an adapter put around it since
            self._patch.embedding_size = size
        try:
            embedded: Tensor = embedding(ids)
        finally:
            self._patch.embedding_size = 1
        averaged = embedded.shape[1] * size == ids.shape[1]
        return embedded if averaged else embedded.unflatten(1, (-1, size)).mean(2)


def patch_loss(
    step: Step, logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **__: Any
) -> Tensor:
    """In place of the model's ``loss_function``."""
    target = step.target
    assert target is not None
    if step.fused:
        loss: Any = step.loss
    else:
        loss, step.losses = patch_cross_entropy(
            logits, target, reduction=step.reduction, label_smoothing=step.label_smoothing, return_losses=True
        )
    if num_items_in_batch is None:
        found: Tensor = loss
        return found
    # the mean of so many targets becomes their sum over the number that the trainer counted
    counted: Tensor = loss * (target != -100).sum() / num_items_in_batch
    return counted


def refuse(target: Tensor, bad: Tensor, message: str) -> Tensor:
    """Raises for bad rows (B or 1); on a GPU, where looking would wait for it, their targets give a loss of NaN."""
    if bad.device.type == "cpu":
        if bool(bad.any()):
            raise PatchSizeError(message)
        return target
    return target.masked_fill(bad.view(-1, 1, 1), -1)  # no class


def patch_mask(attention_mask: Tensor, input_ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """(B, T) to (B, P), and which rows are padded on the left; a patch counts if its first token does."""
    if attention_mask.shape != input_ids.shape:
        raise PatchSizeError(
            f"a patch step takes an attention_mask of the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    left = (attention_mask[:, 1:] > attention_mask[:, :-1]).any(1)
    return attention_mask[:, ::patch_size].contiguous(), left


def patch_positions(position_ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """(..., T) to (..., P), counted from 0 in every document, and whether some document begins within a patch."""
    patches = position_ids.unflatten(-1, (-1, patch_size)) // patch_size
    first: Tensor = patches[..., 0]
    return first, (patches != first.unsqueeze(-1)).any().view(1)
