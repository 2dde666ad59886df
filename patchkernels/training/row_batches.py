"""A user's rows of tokens as the batches of a run's steps.

A row is ``context`` token ids: a tensor, an array, a list, or a dictionary with ``input_ids`` and, where they differ,
``labels``. In a phase of patch size K, K rows make one row of a batch if all steps have equal numbers of positions. The
rows that a step reads depend on the step alone, so that a resumed run reads what it would have read.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from patchkernels.data.batches import Rows
from patchkernels.hf.rows import PatchRows, PatchStream
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import Schedule


class CheckedRows:
    """The rows of a dataset or of an iterable, each checked and as a dictionary of ``input_ids`` and ``labels``.

    Attributes:
        context: number of tokens of a row, that of the first one.
        has_length: whether rows can be read in any order; otherwise only one after the other.
        brings_labels: whether rows may have labels that differ from their ids.

    Raises:
        TypeError: neither a dataset nor an iterable.
        ValueError: there is no row, or the first one is none.
    """

    def __init__(self, rows: Any) -> None:
        if isinstance(rows, Mapping | str | bytes) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
            raise TypeError(f"rows must be a dataset or an iterable of rows of token ids, got {type(rows).__name__}")
        is_stream = isinstance(rows, IterableDataset)  # it has a __getitem__, which raises
        self.has_length = not is_stream and hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        self.rows, self.context = rows, 0
        self.is_iterator = not self.has_length and iter(rows) is rows  # can be read only once
        if self.has_length:
            first = rows[0] if len(rows) else None
        else:
            iterator = iter(rows)
            first = next(iterator, None)
            if self.is_iterator:
                self.rows = itertools.chain([first], iterator)
        if first is None:
            raise ValueError("there are no rows: the dataset is empty")
        self.brings_labels = isinstance(first, Mapping)
        self.first = self.check(first, 0)
        self.context = len(self.first["input_ids"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.check(self.rows[number], number)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.rows is None:
            raise ValueError("the rows are an iterator, which has ended: pass an iterable that can begin again")
        rows: Iterable[Any] = (self.rows[i] for i in range(len(self))) if self.has_length else self.rows
        if self.is_iterator:
            self.rows = None
        for number, row in enumerate(rows):
            yield self.check(row, number)

    def check(self, row: Any, number: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of a row, each int64 of shape (context). Masked tokens have ignored labels."""
        fields = row if isinstance(row, Mapping) else {"input_ids": row}
        if "input_ids" not in fields:
            raise ValueError(f"row {number} must hold input_ids, got {sorted(fields)}")
        ids, labels, mask = (fields.get(name) for name in ("input_ids", "labels", "attention_mask"))
        ids = as_tensor(ids)
        labels = ids if labels is None else as_tensor(labels)
        for name, tensor in (("input_ids", ids), ("labels", labels)):
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.ndim != 1 or not len(tensor):
                raise ValueError(
                    f"row {number}: {name} must be the token ids of one row, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
            if len(tensor) != (self.context or len(ids)):
                raise ValueError(
                    f"row {number}: {name} must be {self.context or len(ids)} token ids, as many as in the first row, "
                    f"got {len(tensor)}"
                )
        if mask is not None:
            labels = labels.masked_fill(as_tensor(mask) == 0, IGNORE_INDEX)
        return {"input_ids": ids.long(), "labels": labels.long()}

    def digest(self) -> str:
        """Names the rows by their number and by the first and the last of them; a stream by its first row."""
        rows = [self.first, self[len(self) - 1]] if self.has_length else [self.first]
        content = hashlib.sha256(str(len(self) if self.has_length else None).encode())
        for tensor in (tensor for row in rows for tensor in row.values()):
            content.update(tensor.numpy().tobytes())
        return content.hexdigest()[:16]


def as_tensor(values: Any) -> Tensor:
    """A tensor of these values. Arrays are copied, because torch warns of read-only ones (memory-mapped files)."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


class RowBatches:
    """The batches of rows that can be read in any order. Every epoch has a new random order, or none.

    The process of rank r reads the rows r, r + ``world_size``, ... of every batch.
    """

    def __init__(
        self, rows: CheckedRows, schedule: Schedule, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows = PatchRows(rows, schedule, seed, shuffle)
        self.labels_are_ids = not rows.brings_labels
        self.batch_size, self.rank, self.world_size = schedule.batch_size, rank, world_size

    def batch(self, step: int) -> Rows:
        numbers = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size)
        return stacked([self.rows[number] for number in numbers], self.labels_are_ids)


class StreamBatches:
    """The batches of rows that can only be read in order. A resumed run reads them from the beginning, up to its step.

    Every process reads all rows and keeps those of its rank.
    """

    def __init__(self, rows: CheckedRows, schedule: Schedule, rank: int = 0, world_size: int = 1) -> None:
        self.stream = iter(PatchStream(rows, schedule))
        self.labels_are_ids = not rows.brings_labels
        self.batch_size, self.rank, self.world_size = schedule.batch_size, rank, world_size
        self.step = -1  # of the latest batch
        self.latest: Rows = (torch.empty(0), torch.empty(0), None)

    def batch(self, step: int) -> Rows:
        """The batch of the step of the last call, or of a later one."""
        if step != self.step:
            skipped = (step - self.step - 1) * self.batch_size
            rows = list(itertools.islice(self.stream, skipped, skipped + self.batch_size))
            self.step, self.latest = step, stacked(rows[self.rank :: self.world_size], self.labels_are_ids)
        return self.latest


def stacked(rows: list[dict[str, Any]], labels_are_ids: bool) -> Rows:
    """Token ids and labels (B, T) of rows of equal length. Labels that are the ids are the same tensor."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return ids, ids if labels_are_ids else torch.stack([row["labels"] for row in rows]), None
