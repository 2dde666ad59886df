"""Turns patch steps of a Hugging Face model on and off."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from patchkernels.hf.attach import attach, detach
from patchkernels.hf.class_swap import SwappedClass, swap_class
from patchkernels.hf.modules import PatchState
from patchkernels.hf.patch_step import PatchSizeMixin, PatchStepMixin, can_fuse
from patchkernels.hf.probe import find_step
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

    A patch step must be exact: the unchanged model applied to mean embeddings, with the K-token cross entropy of its
    logits. A model that is not enabled yet is examined for that, without running or changing it: its weights, dtype,
    device, hooks, buffers and training mode stay as they are, as do all random states. What runs is a copy in fp32
    without hooks, with random numbers added to all weights, on some dozen tokens, about 15 times, in evaluation and in
    training mode. Found out are

    - whether the loss is the mean cross entropy of the logits, computed by ``self.loss_function``, which a patch step
      replaces, plus losses that do not depend on the labels;
    - whether the model is causal;
    - whether tokens that are each repeated give the loss, the loss of every target and all gradients of the tokens,
      in patches of 2 and 3, and different tokens those of mean embeddings in the unmodified model. The loss is
      computed in the head if that is exact, else from the model's logits.

    The copy has all weights if these are at most 2**24 parameters. Of a larger model, and of one on the meta device,
    sharded (FSDP2, tensor parallelism, ZeRO-3) or quantised, a tiny model of the same class and configuration takes
    its place, with the same adapters of PEFT, if it consists of the same modules, and these have the same flags and
    functions as attributes; if not, a copy of the first layers, with all kinds of layers, of at most 2**29 parameters.
    A tiny model takes less than a second, and so does a large one for which a tiny one stands; a copy of 2**24
    parameters takes some seconds on one core, and a copy of 2**29 minutes and 10 GiB.

    A patch step raises an error if the model does something in it that it did not do when it was examined: if it
    changes its labels or its logits, calls its loss function twice, or uses logits that were never computed.

    Args:
        model: a causal language model of transformers, or PEFT's wrapper of one.
        patch_size: K, at least 1.
        reduction: ``"mean"`` or ``"slot_mean"``, as in :func:`patchkernels.patch_cross_entropy`.
        label_smoothing: of patch steps, in [0, 1].

    Returns:
        the model itself.

    Raises:
        TypeError: not a causal language model of transformers: another class, no output head or several, an
            encoder-decoder.
        ValueError: K < 1, an unknown reduction, or a model in which no patch step is exact, with the reason, or whether
            one is exact cannot be found out, because the model is large or sharded and made of other modules than its
            configuration says; a prompt of PEFT, or an embedding or head of another enabled model.
        ImportError: transformers older than 5.0.
    """
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise ImportError(f"patchkernels.hf needs transformers >= 5.0, found {transformers.__version__}")
    inner = unwrap(model)
    name = type(inner).__name__
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel, got {name}; enable a model before it is compiled or wrapped"
        )
    if inner.config.is_encoder_decoder:
        raise TypeError(f"{name} is an encoder-decoder; patches need a causal language model")
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{name} has no output head (get_output_embeddings() is {head})")
    if isinstance(head, nn.ModuleList):
        raise TypeError(f"{name} has {len(head)} output heads, one for each of several kinds of tokens; expected one")
    if reduction not in ("mean", "slot_mean"):
        raise ValueError(f"reduction must be 'mean' or 'slot_mean', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_patch_size(patch_size)
    if not isinstance(inner, PatchStepMixin):
        for role, module in (("embedding", inner.get_input_embeddings()), ("head", head)):
            if isinstance(module, SwappedClass):
                raise ValueError(f"the {role} of {name} is part of another enabled model; disable that first")
        if inner is not model and getattr(model.active_peft_config, "is_prompt_learning", False):
            raise ValueError(f"{name} has a prompt of PEFT, whose tokens stand before those of the patches")
        kind = find_step(inner)
        attach(inner, kind)
        if kind.logit_map is None:
            logger.warning("%s: the loss is computed from materialised logits: it is not exact in the head", name)
    state: Any = inner._patch_state
    state.settings.patch_size = patch_size
    state.settings.reduction = reduction
    state.settings.label_smoothing = label_smoothing
    if inner is not model and not isinstance(model, PatchSizeMixin):
        swap_class(model, PatchSizeMixin, state)
    return model


def disable(model: Model) -> Model:
    """Restores the classes of the model and its modules. Has no effect on a model that is not enabled.

    Raises:
        ValueError: after enabling, a module was given another class (a parametrization) or forward (hooks of
            accelerate) that is built on the one to be restored.
    """
    detach(model)
    return model


def is_fused(model: Any) -> bool:
    """Whether an enabled model computes the loss of a patch step in its head, so that the logits never exist.

    If not, the loss is computed from the model's own logits ("materialised").
    """
    inner = unwrap(model)
    state: PatchState = inner._patch_state
    return state.settings.logit_map is not None and can_fuse(inner.get_output_embeddings(), state)


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def token_level(model: Any) -> Iterator[None]:
    """Sets ``model.patch_size`` to 1 for the calling thread inside the block, for evaluation in a patch phase."""
    state: PatchState = unwrap(model)._patch_state
    with state.token_level():
        yield
