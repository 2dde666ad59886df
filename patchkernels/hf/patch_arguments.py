"""The arguments of a model's forward in a patch step: each is turned into patches, passed on, or refused.

None is dropped, and none that speaks of tokens reaches the model's forward, which would take tokens for patches.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchkernels.numerics import IGNORE_INDEX
from patchkernels.ops.targets import mask_document_starts, next_patch_targets

logger = logging.getLogger("patchkernels")

NO_CLASS = -1  # a target outside every vocabulary: on a GPU its loss is NaN
CACHES = ("past_key_values", "cache_params", "mems", "past_buckets_states", "state")  # what models call their cache
KINDS = ("token_type_ids", "mm_token_type_ids")  # of a token each; all tokens of a patch must be of one kind
PACKED_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")  # where documents begin and end, for flash attention
CONVERTED = ("attention_mask", "position_ids", *KINDS, *PACKED_LENGTHS)
WAY_OUT = "for an ordinary step set model.patch_size = 1, or use hf.token_level(model)"


class PatchSizeError(ValueError):
    """A batch that cannot be cut into patches, or an argument that a patch step does not take."""


def patch_size_of(kwargs: dict[str, Any], patch_size: int, name: str) -> int | None:
    """The patch size of the step that a forward is asked for; None for the model's own forward.

    ``patch_size`` is the model's; a batch with ``shift_labels`` (B, P, K) brings its own. A call without labels that
    has a cache, or asks for one, is a step of generation, which reads single tokens in every phase.
    """
    shift_labels = kwargs.get("shift_labels")
    if isinstance(shift_labels, Tensor) and shift_labels.ndim == 3:
        return shift_labels.shape[2]
    if patch_size == 1:
        return None
    has_cache = kwargs.get("use_cache") or any(kwargs.get(cache) is not None for cache in CACHES)
    if not has_cache or kwargs.get("labels") is not None or shift_labels is not None:
        return patch_size
    if not torch.compiler.is_compiling():
        warn_once(
            f"{name} generates text token by token although its patch_size is {patch_size}; "
            "after the patch phase alone it is not a language model of tokens"
        )
    return None


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def convert_arguments(kwargs: dict[str, Any], patch_size: int) -> tuple[Tensor, Tensor]:
    """Replaces the arguments of tokens by those of patches. Returns token ids (B, T) and targets (B, P, K).

    Raises:
        PatchSizeError: an argument that is missing, has the wrong shape, or has no meaning for patches.
    """
    ids, target = take_tokens(kwargs, patch_size)
    refuse_requests(kwargs)
    if patch_size > 1:
        refuse_values_of_tokens(kwargs, ids)
    target = convert_mask_and_positions(kwargs, ids, target, patch_size)
    for name in KINDS:
        if kwargs.get(name) is not None:
            kwargs[name], mixed = first_of_patches(kwargs[name], patch_size)
            target = reject_rows(target, mixed, f"the tokens of a patch must have the same {name}")
    for name in PACKED_LENGTHS:
        if kwargs.get(name) is not None:
            ends_elsewhere = (kwargs[name][-1] != target.shape[:2].numel()).view(1)
            target = reject_rows(target, ends_elsewhere, f"a patch step takes {name} in patches, not in tokens")
    return ids, target


def take_tokens(kwargs: dict[str, Any], patch_size: int) -> tuple[Tensor, Tensor]:
    """Takes token ids and labels out of the arguments of a forward: ids (B, T) and targets (B, P, K)."""
    ids: Tensor | None = kwargs.pop("input_ids", None)
    labels: Tensor | None = kwargs.pop("labels", None)
    shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
    if ids is None or kwargs.get("inputs_embeds") is not None:
        raise PatchSizeError(
            "a patch step needs input_ids and no inputs_embeds; embeddings of tokens cannot be told from those of "
            f"patches; {WAY_OUT}"
        )
    if shift_labels is not None and shift_labels.ndim == 3:
        if ids.ndim != 2 or (len(ids), ids.shape[1]) != (len(shift_labels), shift_labels.shape[1] * patch_size):
            raise PatchSizeError(
                "shift_labels (B, P, K) need input_ids (B, P K), "
                f"got {tuple(shift_labels.shape)} and {tuple(ids.shape)}"
            )
        return ids, shift_labels
    given = labels if shift_labels is None else shift_labels
    if given is None:
        raise PatchSizeError(f"a patch step needs labels; for logits or generation: {WAY_OUT}")
    if ids.ndim != 2 or ids.shape[1] % patch_size or given.shape != ids.shape:
        raise PatchSizeError(
            f"a patch step needs input_ids and labels (B, T) with T divisible by patch_size={patch_size}, "
            f"got {tuple(ids.shape)} and {tuple(given.shape)}"
        )
    if shift_labels is None:
        return ids, next_patch_targets(given, patch_size)
    # shift_labels[:, t] is the label of token t + 1, as in transformers; the first token's is not needed.
    unshifted = F.pad(shift_labels, (1, patch_size - 1), value=IGNORE_INDEX)
    return ids, next_patch_targets(unshifted, patch_size)[:, :-1].contiguous()


def refuse_requests(kwargs: dict[str, Any]) -> None:
    """Raises ``PatchSizeError`` for arguments that make no sense in a patch step: caches and single rows of logits."""
    for name in (*CACHES, "cache_position"):
        if kwargs.get(name) is not None:
            raise PatchSizeError(f"a patch step takes no {name}: a cache holds tokens; {WAY_OUT}")
    if kwargs.get("use_cache"):
        raise PatchSizeError(f"a patch step takes no use_cache=True: the cache would hold patches; {WAY_OUT}")
    for name in ("logits_to_keep", "num_logits_to_keep"):
        kept = kwargs.get(name)
        if isinstance(kept, Tensor) or kept:
            raise PatchSizeError(f"a patch step takes no {name}: its loss needs the logits of all rows; {WAY_OUT}")


def refuse_values_of_tokens(kwargs: dict[str, Any], ids: Tensor) -> None:
    """Raises ``PatchSizeError`` for tensors that seem to hold a value for every token, and that cannot be converted."""
    sizes = (ids.shape[1], ids.numel())
    for name, value in kwargs.items():
        if name in CONVERTED or name.startswith("encoder_"):
            continue
        if any(size in sizes for tensor in tensors(value) for size in tensor.shape):
            raise PatchSizeError(
                f"a patch step cannot turn the {name} of tokens into one of patches (input_ids are "
                f"{tuple(ids.shape)}); {WAY_OUT}"
            )


def tensors(value: Any) -> list[Any]:
    """The tensors and arrays in an argument, which may be a list, a tuple or a dictionary of them."""
    if isinstance(value, dict):
        value = list(value.values())
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if hasattr(item, "shape")]


def convert_mask_and_positions(kwargs: dict[str, Any], ids: Tensor, target: Tensor, patch_size: int) -> Tensor:
    """Replaces ``attention_mask`` and ``position_ids`` with those of patches; returns the targets that remain.

    No row predicts the first patch of a document, since the patch before it belongs to another document.
    """
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"], padded_left = patch_mask(kwargs["attention_mask"], ids, patch_size)
        message = "a patch step takes right padding: left padding shifts the patches"
        target = reject_rows(target, padded_left, message)
    if kwargs.get("position_ids") is not None:
        positions, is_off = patch_positions(kwargs["position_ids"], ids, patch_size)
        # The positions of padding may be any, but then nothing is predicted there. No target shows whether the first
        # patch is padding in part; if it is, it predicts nothing.
        predicted = target != IGNORE_INDEX
        predicts = predicted[:, :1].any(-1, keepdim=True).expand(-1, -1, patch_size)
        predicted = torch.cat([predicts, predicted[:, :-1]], 1)
        message = f"documents of position_ids must count from 0 and begin on patch boundaries of {patch_size} tokens"
        target = reject_rows(target, (is_off & predicted).any().view(1), message)
        kwargs["position_ids"] = positions
        begins = positions.reshape(-1, *positions.shape[-2:])[0] == 0  # of several kinds of positions, the first
        target = mask_document_starts(target, begins)
    return target


def patch_mask(attention_mask: Any, ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Turns a mask of tokens (B, T) into one of patches (B, P), and says which rows (B) are padded on the left.

    A patch is attended to if its first token is.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        raise PatchSizeError(
            f"a patch step takes an attention_mask of the shape of input_ids, {tuple(ids.shape)}, "
            f"got {describe_shape(attention_mask)}"
        )
    padded_left = (attention_mask[:, 1:] > attention_mask[:, :-1]).any(1)
    return attention_mask[:, ::patch_size].contiguous(), padded_left


def patch_positions(position_ids: Tensor, ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Turns positions of tokens (..., B or 1, T) into those of patches. Both count from 0 in every document.

    The second result (B or 1, P, K) says which tokens have not the position that the first token of their patch lets
    expect. Zeros after the first token of a row may be padding in its first patch.
    """
    if position_ids.ndim < 2 or position_ids.shape[-1] != ids.shape[1] or position_ids.shape[-2] not in (1, len(ids)):
        raise PatchSizeError(
            f"a patch step takes position_ids (..., B or 1, T) for input_ids {tuple(ids.shape)}, "
            f"got {tuple(position_ids.shape)}"
        )
    patches = position_ids.unflatten(-1, (-1, patch_size))  # (..., B or 1, P, K)
    first = patches[..., :1]
    is_off = (patches != first + torch.arange(patch_size, device=ids.device)) | (first % patch_size != 0)
    is_zero = (patches == 0) & (torch.arange(patches.shape[-2], device=ids.device)[:, None] == 0)
    return first[..., 0] // patch_size, (is_off & ~is_zero).reshape(-1, *patches.shape[-3:]).any(0)


def first_of_patches(values: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The values of the first tokens of patches, and whether (1) tokens of a patch differ."""
    patches = values.unflatten(-1, (-1, patch_size))
    first: Tensor = patches[..., 0]
    return first, (patches != first.unsqueeze(-1)).any().view(1)


def reject(loss: Tensor, rejected: bool | Tensor, message: str) -> Tensor:
    """The loss; raises ``PatchSizeError`` if it is rejected.

    On a GPU, where reading a tensor would wait for the device, and in a compiled graph the loss becomes NaN instead.
    """
    if isinstance(rejected, Tensor) and (rejected.device.type != "cpu" or torch.compiler.is_compiling()):
        return loss.masked_fill(rejected, torch.nan)
    if rejected:
        raise PatchSizeError(message)
    return loss


def describe_shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def reject_rows(target: Tensor, rejected: Tensor, message: str) -> Tensor:
    """Raises ``PatchSizeError`` if a row (B or 1) is rejected.

    On a GPU, where reading ``rejected`` would wait for the device, and in a compiled graph, which cannot raise, the
    rejected rows get targets outside the vocabulary: the loss becomes NaN, or on a CPU an ``IndexError``.
    """
    if rejected.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(rejected.any()):
            raise PatchSizeError(message)
        return target
    return target.masked_fill(rejected.view(-1, 1, 1), NO_CLASS)
