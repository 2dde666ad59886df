"""The collator that cuts a batch of rows into patches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from patchkernels.hf.rows import ROW_COLUMNS, document_lengths, document_positions, join, other_columns, unpack
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.ops.targets import mask_document_starts, next_patch_targets

TOKEN_COUNTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of packed documents


class PatchCollator:
    """Makes a batch of rows. In a patch phase it adds ``shift_labels`` (B, P, K), which make it a patch step.

    Rows may have any length. The last patch of a row, or of every document of a packed row, is filled up with padding.
    No target is lost and no other number changes: the last patch predicts nothing, and no later patch attends to it.

    Args:
        collate: turns a list of rows into a batch with ``labels``. By default rows are padded on the right.
        pad_token_id: the token of the padding, whose labels are ignored.

    Raises:
        ValueError: rows of several patch sizes, a ``collate`` that gives no labels or pads on the left, or documents
            (``position_ids``) that do not begin on patch boundaries.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any] | None = None, pad_token_id: int = 0) -> None:
        self.collate, self.pad_token_id = collate or self.pad_right, pad_token_id

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        patch_sizes = {row.get("patch_size", 1) for row in rows}
        if len(patch_sizes) > 1:
            raise ValueError(f"the rows of a batch must be of one patch size, got {sorted(patch_sizes)}")
        (patch_size,) = patch_sizes
        rows = [{name: row[name] for name in row if name != "patch_size"} for row in rows]
        if patch_size == 1:
            return dict(self.collate(rows))
        with padding_on_the_right(getattr(self.collate, "tokenizer", None)):
            return self.patches(rows, patch_size)

    def patches(self, rows: list[dict[str, Any]], patch_size: int) -> dict[str, Any]:
        """A batch of rows, cut into patches."""
        batch = self.fill_last_patch(dict(self.collate(rows)), patch_size)
        if documents_begin_inside_patches(batch, patch_size):
            rows = [fill_documents(row, patch_size, self.pad_token_id) for row in rows]
            batch = self.fill_last_patch(dict(self.collate(rows)), patch_size)
            if documents_begin_inside_patches(batch, patch_size):
                raise ValueError(f"the collator begins documents inside patches of {patch_size} tokens")
        reject_left_padding(batch.get("attention_mask"))
        target = next_patch_targets(batch["labels"], patch_size)
        if is_packed(batch):
            target = mask_document_starts(target, batch["position_ids"][:, ::patch_size] == 0)
        count_in_patches(batch, patch_size)
        return {**batch, "shift_labels": target}

    def fill_last_patch(self, batch: dict[str, Any], patch_size: int) -> dict[str, Any]:
        """Pads every tensor (B, T) of the batch on the right until T is divisible by the patch size."""
        if "labels" not in batch:
            raise ValueError(f"the collator must give labels, got {sorted(batch)}")
        length = batch["input_ids"].shape[1]
        missing = -length % patch_size
        if not missing:
            return batch
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        filled = {  # positions of 0 are those of padding
            name: F.pad(value, (0, missing), value=fill.get(name, 0))
            for name, value in batch.items()
            if isinstance(value, Tensor) and value.shape[1:] == (length,)
        }
        return {**batch, **filled}

    def pad_right(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of ``input_ids`` and ``labels`` (B, T), with an ``attention_mask`` if rows have padding.

        A batch of packed rows has ``position_ids`` (B, T) instead. Each of its tokens of padding is a document of its
        own, to which nothing attends: a mask would keep transformers from finding the documents. A row without tokens
        is one token of padding.
        """
        if not isinstance(rows[0]["input_ids"], Sized):
            raise ValueError(f"input_ids must be a sequence of token ids, got {rows[0]['input_ids']!r}")
        if others := other_columns(rows):
            raise ValueError(
                f"a batch is made of {sorted(ROW_COLUMNS)}; remove the columns {others}, or pass a data_collator that "
                "pads them"
            )
        empty = {"input_ids": [self.pad_token_id], "labels": [IGNORE_INDEX]}
        rows = [row if len(row["input_ids"]) else empty for row in rows]
        packed = any(row.get("seq_lengths") is not None or row.get("position_ids") is not None for row in rows)
        if packed:
            rows = [join([row], patch_size=1) for row in rows]  # without padding
        ids, labels, masks = (list(tensors) for tensors in zip(*(unpack(row) for row in rows)))
        mask = pad_sequence(masks, batch_first=True, padding_value=False)
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        batch["labels"].masked_fill_(~mask, IGNORE_INDEX)
        if packed:
            positions = [document_positions(document_lengths(row, len(row["input_ids"]))) for row in rows]
            batch["position_ids"] = pad_sequence(positions, batch_first=True)
            batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORE_INDEX)
        elif not bool(mask.all()):
            batch["attention_mask"] = mask.long()
        return batch


@contextlib.contextmanager
def padding_on_the_right(tokenizer: Any) -> Iterator[None]:
    """Lets a tokenizer, if there is one, pad on the right inside the block."""
    side = getattr(tokenizer, "padding_side", None)
    if side is None:
        yield
        return
    tokenizer.padding_side = "right"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def is_packed(batch: dict[str, Any]) -> bool:
    """Whether a batch says where its documents begin, with ``position_ids`` (B, T)."""
    return "position_ids" in batch and batch["position_ids"].ndim == 2


def documents_begin_inside_patches(batch: dict[str, Any], patch_size: int) -> bool:
    """Whether a document of several tokens does; one of a single token has no targets, and may be padding."""
    if not is_packed(batch):
        return False
    positions = batch["position_ids"].unflatten(1, (-1, patch_size))
    counts = positions == positions[..., :1] + torch.arange(patch_size)
    return bool((~counts & (positions != 0)).any() or (positions[..., 0] % patch_size != 0).any())


def fill_documents(row: dict[str, Any], patch_size: int, pad_token_id: int) -> dict[str, Any]:
    """Fills every document of a row with padding to whole patches, so that the next one begins on a patch boundary."""
    ids, labels, _ = unpack(row)
    lengths = document_lengths(row, len(ids))
    filled = [-(-length // patch_size) * patch_size for length in lengths]

    def fill(tokens: Tensor, value: int) -> Tensor:
        documents = zip(tokens.split(lengths), lengths, filled)
        return torch.cat([F.pad(document, (0, end - begin), value=value) for document, begin, end in documents])

    other = other_columns([row])
    row = {**row, "input_ids": fill(ids, pad_token_id), "labels": fill(labels, IGNORE_INDEX)}
    if row.get("seq_lengths") is not None:
        row["seq_lengths"] = filled
    if row.get("position_ids") is not None:
        row["position_ids"] = document_positions(filled)
    return {**row, **{name: fill(torch.as_tensor(row[name]), 0) for name in other}}


def reject_left_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is None or attention_mask.ndim != 2:
        return
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError(
            "the collator pads on the left, which shifts the patches of a row; set tokenizer.padding_side = 'right'"
        )


def count_in_patches(batch: dict[str, Any], patch_size: int) -> None:
    """Turns what a batch says of packed documents in tokens, for flash attention and convolutions, into patches."""
    for name in TOKEN_COUNTS:
        if name in batch:
            batch[name] = (batch[name] + patch_size - 1) // patch_size
    if "seq_idx" in batch:
        batch["seq_idx"] = batch["seq_idx"][:, ::patch_size].contiguous()
