"""Turns patch steps of a Hugging Face model on and off."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from patchkernels.hf.class_swap import restore_class, swap_class
from patchkernels.hf.modules import LossHeadMixin, PatchEmbeddingMixin, PatchSettings, PatchState, runs_forward_of
from patchkernels.hf.patch_step import PatchSizeMixin, PatchStepMixin
from patchkernels.hf.probe import describe, find_logit_map, inexactness, probe_ids, token_loss
from patchkernels.numerics import check_patch_size

logger = logging.getLogger("patchkernels")
Model = TypeVar("Model", bound=nn.Module)

OLDEST_TRANSFORMERS = (5, 0)


def enable(model: Model, patch_size: int = 1, *, reduction: str = "mean", label_smoothing: float = 0.0) -> Model:
    """Makes ``model(input_ids, labels=labels)`` a step on patches of ``patch_size`` tokens.

    The patch step is that of patch-level training (arXiv 2407.12665, section 2): the mean of K embeddings in, and one
    row of logits that predicts the K tokens of the next patch. ``model.patch_size`` may be changed at any time; at 1
    the model takes its ordinary step. A batch may also bring the targets of its patches, ``shift_labels`` of shape
    (B, P, K) from :func:`patchkernels.next_patch_targets`, which make it a step on patches of K tokens whatever
    ``model.patch_size`` is. The loss is the mean over all valid targets, or the ``"slot_mean"``. With
    ``num_items_in_batch`` it is multiplied by the batch's number of valid targets and divided by that number.

    In a patch step ``input_ids`` (B, T) and ``labels`` (B, T) are unshifted, and T is divisible by K. Padding is on the
    right, and packed documents (``position_ids``) begin on patch boundaries. If the loss is fused (:func:`is_fused`),
    the output has no logits.

    A model that is not enabled yet is run 3 to 6 times on 6 tokens, without gradients:

    - if its head is a plain ``nn.Linear``, with known numbers as the head's output, to find out what the model does to
      them before it calls its loss function;
    - on the tokens, for the loss that a patch step is compared with;
    - if the first run allows it, with the loss in the head: on every token twice in patches of two, which must give
      the loss of the tokens, and on patches of different tokens, which must run without an error;
    - if that was not possible or not exact, the same with the loss computed from the model's logits.

    Args:
        model: a causal language model of transformers, or PEFT's wrapper of one.
        patch_size: K, at least 1.
        reduction: ``"mean"`` or ``"slot_mean"``, as in :func:`patchkernels.patch_cross_entropy`.
        label_smoothing: of patch steps, in [0, 1].

    Returns:
        the model itself.

    Raises:
        TypeError: not a causal language model of transformers: another class, no output head, an encoder-decoder.
        ValueError: K < 1, an unknown reduction, or a model in which no patch step is exact, with the reason.
        ImportError: transformers older than 5.0.
    """
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise ImportError(f"patchkernels.hf needs transformers >= 5.0, found {transformers.__version__}")
    inner = unwrap(model)
    name = type(inner).__name__
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(f"expected a transformers PreTrainedModel, got {name}")
    if inner.config.is_encoder_decoder:
        raise TypeError(f"{name} is an encoder-decoder; patches need a causal language model")
    if not isinstance(inner.get_output_embeddings(), nn.Module):
        raise TypeError(f"{name} has no output head (get_output_embeddings() is {inner.get_output_embeddings()})")
    if reduction not in ("mean", "slot_mean"):
        raise ValueError(f"reduction must be 'mean' or 'slot_mean', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_patch_size(patch_size)
    if not isinstance(inner, PatchStepMixin):
        attach_patch_step(inner, name)
    state: Any = inner._patch_state
    state.settings.patch_size = patch_size
    state.settings.reduction = reduction
    state.settings.label_smoothing = label_smoothing
    if inner is not model and not isinstance(model, PatchSizeMixin):
        swap_class(model, PatchSizeMixin, state)
    return model


def attach_patch_step(model: Any, name: str) -> None:
    """Swaps the classes of the model, its embedding and its head for an exact patch step.

    Raises:
        ValueError: no patch step is exact. The model is left as it was.
    """
    state = PatchState(PatchSettings())
    swap_class(model, PatchStepMixin, state)
    try:
        embedding = model.get_input_embeddings()
        is_plain_embedding = runs_forward_of(embedding, nn.Embedding)
        if is_plain_embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq:
            swap_class(embedding, PatchEmbeddingMixin, state)
        reason = find_exact_loss(model, state, probe_ids(model))
        if reason:
            raise ValueError(f"no patch step of {name} is exact: {reason}")
    except Exception:
        disable(model)
        raise
    if state.settings.logit_map is None:
        logger.warning("%s: the loss is computed from materialised logits: it is not exact in the head", name)


def find_exact_loss(model: Any, state: PatchState, ids: Tensor) -> str:
    """Makes patch steps compute the loss in the head if that is exact, and otherwise from the model's logits.

    Returns why neither is exact, or an empty string.
    """
    settings, head = state.settings, model.get_output_embeddings()
    settings.logit_map = find_logit_map(model, ids)
    try:
        expected = token_loss(model, ids)
    except Exception as error:
        return describe(error)
    if settings.logit_map is not None:
        swap_class(head, LossHeadMixin, state)
        if not inexactness(model, ids, expected):
            return ""
        restore_class(head)
        settings.logit_map = None
    return inexactness(model, ids, expected)


def disable(model: Model) -> Model:
    """Restores the classes of the model and its modules. Has no effect on a model that is not enabled."""
    for module in list(model.modules()):
        restore_class(module)
    return model


def is_fused(model: Any) -> bool:
    """Whether an enabled model computes the loss of a patch step in its head, so that the logits never exist.

    If not, the loss is computed from the model's own logits ("materialised").
    """
    state: PatchState = unwrap(model)._patch_state
    return state.settings.logit_map is not None


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def token_level(model: Any) -> Iterator[None]:
    """Sets ``model.patch_size`` to 1 inside the block, for evaluation in a patch phase."""
    patch_size, model.patch_size = model.patch_size, 1
    try:
        yield
    finally:
        model.patch_size = patch_size
