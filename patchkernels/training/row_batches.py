"""A user's rows of tokens as the batches of a run's steps.

A row is ``context`` token ids: a tensor, an array, a list, or a dictionary with ``input_ids`` and, where they differ,
``labels``. In a phase of patch size K, K rows make one row of a batch if all steps have equal numbers of positions. The
rows that a step reads depend on the step alone, so that a resumed run reads what it would have read. Rows that draw
random numbers from torch, such as a loader that shuffles, draw from a generator of their own on the CPU.
"""

from __future__ import annotations

import contextlib
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

LOOKED_AT = 64  # how many rows of a dataset are read to name it
LABELS = ("labels", "attention_mask")  # what lets the labels of a row differ from its token ids


@contextlib.contextmanager
def drawing_from(state: Tensor) -> Iterator[None]:
    """Lets torch's generator on the CPU draw from this state inside the block, and moves the state on."""
    outside = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        state.copy_(torch.get_rng_state())
        torch.set_rng_state(outside)


def generator_state(*seed: int) -> Tensor:
    """The state of a generator on the CPU, for these non-negative numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0])).get_state()


class CheckedRows:
    """The rows of a dataset or of an iterable, each checked and as a dictionary of ``input_ids`` and ``labels``.

    Attributes:
        context: number of tokens of a row, that of the first one.
        has_length: whether rows can be read in any order; otherwise only one after the other.
        brings_labels: whether the rows are dictionaries with labels or a mask, so that labels may differ from the ids.
        random_state: that of the generator on the CPU which an iterable draws from.

    Raises:
        TypeError: neither a dataset nor an iterable.
        ValueError: there is no row, or the first one is none.
    """

    def __init__(self, rows: Any, seed: int = 0) -> None:
        if isinstance(rows, Mapping | str | bytes) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
            raise TypeError(f"rows must be a dataset or an iterable of rows of token ids, got {type(rows).__name__}")
        is_stream = isinstance(rows, IterableDataset)  # it has a __getitem__, which raises
        self.has_length = not is_stream and hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        self.rows, self.context = rows, 0
        self.set_epoch(0)
        self.random_state = generator_state(seed)
        self.begun: Iterator[Any] | None = None  # all rows, of which the first has been looked at
        with drawing_from(self.random_state):
            if self.has_length:
                first = self._first() if len(rows) else None
            else:
                iterator = iter(rows)
                first = next(iterator, None)
                self.begun = itertools.chain([first], iterator)
        if first is None:
            raise ValueError("there are no rows: the dataset is empty")
        self.are_dictionaries = isinstance(first, Mapping)
        self.brings_labels = self.are_dictionaries and any(first.get(name) is not None for name in LABELS)
        self.first = self.check(first, 0)
        self.context = len(self.first["input_ids"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.check(self.rows[number], number)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows: Iterable[Any] = (self.rows[i] for i in range(len(self))) if self.has_length else self._begin()
        for number, row in enumerate(rows):
            yield self.check(row, number)

    def set_epoch(self, epoch: int) -> None:
        """Tells a stream that is shuffled anew in every epoch which one begins."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def _first(self) -> Any:
        try:
            return self.rows[0]
        except KeyError as error:
            raise TypeError(f"rows must be read by their numbers, but {type(self.rows).__name__}[0] fails") from error

    def _begin(self) -> Iterator[Any]:
        """The rows of an iterable from the first one on."""
        begun, self.begun = self.begun, None
        if begun is None:
            iterator = iter(self.rows)
            if (first := next(iterator, None)) is None:
                raise ValueError("the rows have ended and cannot be read again: pass an iterable that begins again")
            begun = itertools.chain([first], iterator)
        return begun

    def check(self, row: Any, number: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of a row, each int64 of shape (context). Masked tokens have ignored labels."""
        if isinstance(row, Mapping) != self.are_dictionaries:
            raise ValueError(f"row {number}: either all rows are dictionaries or none, got {type(row).__name__}")
        fields = row if isinstance(row, Mapping) else {"input_ids": row}
        if not self.brings_labels and (others := [name for name in LABELS if fields.get(name) is not None]):
            raise ValueError(f"row {number} has {others[0]}, but the first row has none")
        if "input_ids" not in fields:
            raise ValueError(f"row {number} must hold input_ids, got {sorted(fields)}")
        given = {name: fields.get(name) for name in ("input_ids", *LABELS)}
        names = [name for name, values in given.items() if values is not None]
        tensors = {name: as_tensor(given[name], f"row {number}: {name}") for name in names}
        length = self.context or (len(tensors["input_ids"]) if tensors["input_ids"].ndim else 0)
        for name, tensor in tensors.items():
            is_integer = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
            if not is_integer or tensor.ndim != 1 or not len(tensor) or (tensor.dtype == torch.bool and "ids" in name):
                hint = {0: "; cut a long sequence into rows, with reshape(-1, T) for example",
                        2: "; a DataLoader gives rows with batch_size=None"}.get(tensor.ndim, "")  # fmt: skip
                raise ValueError(
                    f"row {number}: {name} must be integers, one for each token of the row, got {tensor.dtype} of "
                    f"shape {tuple(tensor.shape)}{hint}"
                )
            if len(tensor) != length:
                raise ValueError(
                    f"row {number}: {name} must be {length} integers, as many as the first row has token ids, "
                    f"got {len(tensor)}"
                )
        ids = tensors["input_ids"].long()
        labels = tensors.get("labels", ids).long()
        if "attention_mask" in tensors:
            labels = labels.masked_fill(tensors["attention_mask"] == 0, IGNORE_INDEX)
        return {"input_ids": ids, "labels": labels}

    def some(self) -> list[dict[str, Tensor]]:
        """Some rows, evenly spread; of a stream the first one."""
        if not self.has_length:
            return [self.first]
        numbers = np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self)), dtype=int).tolist()
        with drawing_from(self.random_state.clone()):
            return [self[number] for number in numbers]

    def digest(self) -> str:
        """Names the rows by their number and by some of them."""
        rows = self.some()
        content = hashlib.sha256(str(len(self) if self.has_length else None).encode())
        for tensor in (tensor for row in rows for tensor in row.values()):
            content.update(tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:16]


def as_tensor(values: Any, name: str) -> Tensor:
    """A tensor of these values. Arrays are copied, because torch warns of read-only ones (memory-mapped files)."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.array(values)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be integers, one for each token of the row: {error}") from error


class RowBatches:
    """The batches of rows that can be read in any order. Every epoch has a new random order, or none.

    The process of rank r reads the rows r, r + ``world_size``, ... of every batch.
    """

    def __init__(
        self, rows: CheckedRows, schedule: Schedule, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows, self.seed = PatchRows(rows, schedule, seed, shuffle), seed
        self.labels_are_ids = not rows.brings_labels
        self.batch_size, self.rank, self.world_size = schedule.batch_size, rank, world_size

    def batch(self, step: int) -> Rows:
        numbers = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size)
        with drawing_from(generator_state(self.seed, step)):
            return stacked([self.rows[number] for number in numbers], self.labels_are_ids)


class StreamBatches:
    """The batches of rows that can only be read in order. A resumed run reads them from the beginning, up to its step.

    Every process reads all rows and keeps those of its rank.
    """

    def __init__(self, rows: CheckedRows, schedule: Schedule, rank: int = 0, world_size: int = 1) -> None:
        self.stream, self.random_state = iter(PatchStream(rows, schedule)), rows.random_state
        self.labels_are_ids = not rows.brings_labels
        self.batch_size, self.rank, self.world_size = schedule.batch_size, rank, world_size
        self.step = -1  # of the latest batch
        self.latest: Rows = (torch.empty(0), torch.empty(0), None)

    def batch(self, step: int) -> Rows:
        """The batch of the step of the last call, or of a later one."""
        if step != self.step:
            skipped = (step - self.step - 1) * self.batch_size
            with drawing_from(self.random_state):
                rows = list(itertools.islice(self.stream, skipped, skipped + self.batch_size))
            self.step, self.latest = step, stacked(rows[self.rank :: self.world_size], self.labels_are_ids)
        return self.latest


def stacked(rows: list[dict[str, Any]], labels_are_ids: bool) -> Rows:
    """Token ids and labels (B, T) of rows of equal length. Labels that are the ids are the same tensor."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return ids, ids if labels_are_ids else torch.stack([row["labels"] for row in rows]), None
