"""A training set as the rows of one run through all phases.

A row is one entry of a batch. With constant positions per step it is K examples one after the other in a phase of patch
size K; with constant raw tokens per step it is one example. Which examples a row holds depends only on its number, so
that a run that skips the rows it has read continues bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from patchkernels.schedule import Phase, Schedule, cost_of

ROW_COLUMNS = {"input_ids", "labels", "attention_mask", "position_ids", "seq_lengths"}  # what a row is made of


def example_schedule(phases: tuple[Phase, ...], examples: float, batch_size: int, convention: str) -> Schedule:
    """A schedule over examples in place of tokens.

    Every example counts as ``schedule.context`` tokens, the least number that all patch sizes divide; the examples
    themselves may be of any length.

    Args:
        phases: patch size and share of the examples of each phase.
        examples: how many are read in all. An example counts once in every epoch.
        batch_size: rows of an optimizer step, of all processes together.
        convention: ``"positions"`` or ``"tokens"``, as in :class:`patchkernels.schedule.Schedule`.

    Raises:
        ValueError: too few examples for a step in every phase.
    """
    context = math.lcm(*(phase.patch_size for phase in phases))
    try:
        return Schedule(phases, round(examples * context), batch_size, context, convention)
    except ValueError as error:
        sizes = [phase.patch_size for phase in phases]
        raise ValueError(
            f"{examples:.0f} examples at {batch_size} rows a step leave a phase of {sizes} without a step"
        ) from error


def examples_of_steps(phases: tuple[Phase, ...], steps: int, batch_size: int, convention: str) -> float:
    """How many examples ``steps`` steps read, over all phases together."""
    rows_per_example = cost_of(phases) if convention == "positions" else 1.0
    return steps * batch_size / rows_per_example


def examples_per_row(schedule: Schedule, phase: Phase) -> int:
    return schedule.row_tokens(phase) // schedule.context


def examples_before(schedule: Schedule, step: int) -> int:
    """How many examples are read before a step."""
    return schedule.raw_tokens(step) // schedule.context


def locate_row(schedule: Schedule, row: int) -> tuple[Phase, int]:
    """The phase of a row of the run, and how many examples are read before the row."""
    step, row_of_step = divmod(row, schedule.batch_size)
    index, _ = schedule.locate(step)
    phase = schedule.phases[index]
    return phase, examples_before(schedule, step) + row_of_step * examples_per_row(schedule, phase)


class PatchRows(Dataset[dict[str, Any]]):
    """The rows of a run over a dataset that has a length.

    Args:
        dataset: of examples, each with ``input_ids`` (T); ``labels`` (T) and ``attention_mask`` (T) are optional.
        schedule: from :func:`example_schedule`.
        seed: of the permutations.
        shuffle: permute the examples anew in every epoch; otherwise read them in order.
    """

    def __init__(self, dataset: Any, schedule: Schedule, seed: int, shuffle: bool) -> None:
        if not len(dataset):
            raise ValueError("the training dataset is empty")
        self.dataset, self.schedule, self.seed, self.shuffle = dataset, schedule, seed, shuffle

    def __len__(self) -> int:
        return self.schedule.total_steps * self.schedule.batch_size

    def __getitem__(self, row: int) -> dict[str, Any]:
        phase, first = locate_row(self.schedule, row)
        numbers = range(first, first + examples_per_row(self.schedule, phase))
        return join([self.dataset[self.index(number)] for number in numbers], phase.patch_size)

    def index(self, number: int) -> int:
        """The dataset's index of the example that the run reads after ``number`` others."""
        epoch, number_in_epoch = divmod(number, len(self.dataset))
        return int(self.permutation(epoch)[number_in_epoch]) if self.shuffle else number_in_epoch

    @functools.lru_cache(maxsize=2)  # noqa: B019  (the cache keeps this dataset alive, which lives as long as the run)
    def permutation(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))


class PatchStream(IterableDataset[dict[str, Any]]):
    """The rows of a run over a dataset that can only be read in order; where it ends, it begins again."""

    def __init__(self, dataset: Iterable[dict[str, Any]], schedule: Schedule) -> None:
        self.dataset, self.schedule = dataset, schedule

    def __iter__(self) -> Iterator[dict[str, Any]]:
        examples = self.endless_examples()
        for row in range(self.schedule.total_steps * self.schedule.batch_size):
            phase, _ = locate_row(self.schedule, row)
            yield join([next(examples) for _ in range(examples_per_row(self.schedule, phase))], phase.patch_size)

    def endless_examples(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            empty = True
            if hasattr(self.dataset, "set_epoch"):  # a stream that is shuffled anew in every epoch
                self.dataset.set_epoch(epoch)
            for example in self.dataset:
                empty = False
                yield example
            if empty:
                raise ValueError("the training dataset is empty")


def join(examples: list[dict[str, Any]], patch_size: int) -> dict[str, Any]:
    """One row: the examples one after the other without their padding, and the patch size of its phase.

    The row has labels if an example has them; otherwise the collator makes them. If the examples are packed, which
    ``position_ids`` (T) or ``seq_lengths`` (the lengths of their documents, as in TRL) say, the row is packed too.
    Other numbers of which every example has one for each token are put together too, for collators that read them.
    """
    parts = [unpadded(example) for example in examples]
    row: dict[str, Any] = {"input_ids": torch.cat([ids for ids, _ in parts]), "patch_size": patch_size}
    if any(example.get("labels") is not None for example in examples):
        row["labels"] = torch.cat([labels for _, labels in parts])
    lengths = [document_lengths(example, len(ids)) for example, (ids, _) in zip(examples, parts)]
    for name in ("seq_lengths", "position_ids"):
        if any(example.get(name) is not None for example in examples):
            row[name] = [length for of_example in lengths for length in of_example]
    if "position_ids" in row:
        row["position_ids"] = document_positions(row["position_ids"])
    for name in other_columns(examples):
        columns = [torch.as_tensor(example[name])[unpack(example)[2]] for example in examples]
        row[name] = torch.cat(columns)
    return row


def other_columns(rows: list[dict[str, Any]]) -> list[str]:
    """The names of columns beside ``ROW_COLUMNS`` that hold a number for each token in all rows or examples."""
    names = [name for name in rows[0] if name not in (*ROW_COLUMNS, "patch_size")]
    return [name for name in names if all(is_of_tokens(row.get(name), len(row["input_ids"])) for row in rows)]


def is_of_tokens(values: Any, length: int) -> bool:
    """Whether these are numbers, one for each of so many tokens."""
    if isinstance(values, Tensor | np.ndarray):
        return (
            values.ndim == 1 and len(values) == length and (isinstance(values, Tensor) or values.dtype.kind in "biuf")
        )
    is_list = isinstance(values, list | tuple) and len(values) == length
    return is_list and all(isinstance(value, int | float) for value in values)


def unpadded(example: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and labels (T) of the tokens that the example's attention mask keeps."""
    if "input_ids" not in example:
        raise ValueError(f"an example must hold input_ids, got {sorted(example)}")
    ids, labels, mask = unpack(example)
    if ids.ndim != 1 or labels.shape != ids.shape:
        raise ValueError(
            f"an example must hold input_ids (T) and labels (T), got {tuple(ids.shape)} and {tuple(labels.shape)}"
        )
    return ids[mask], labels[mask]


def unpack(example: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels (by default the ids) and attention mask (by default everything, as bool) of an example."""
    ids = integers("input_ids", example["input_ids"])
    labels, mask = example.get("labels"), example.get("attention_mask")
    labels = ids if labels is None else integers("labels", labels)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    return ids, labels, mask


def integers(name: str, values: Any) -> Tensor:
    """An int64 tensor of a sequence of integers, which may be empty."""
    tensor = torch.as_tensor(values)
    if tensor.dtype.is_floating_point and tensor.numel():
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.long()


def document_lengths(example: dict[str, Any], length: int) -> list[int]:
    """The numbers of tokens of an example's documents. The example is ``length`` tokens without its padding.

    Raises:
        ValueError: the documents of ``seq_lengths`` are longer or shorter than the example, or ``position_ids`` do not
            count from 0 in every document.
    """
    if example.get("seq_lengths") is not None:
        lengths = [int(number) for number in example["seq_lengths"]]
        if sum(lengths) != length:
            raise ValueError(f"seq_lengths must add up to the {length} tokens of the example, got {lengths}")
        return lengths
    if example.get("position_ids") is None or not length:
        return [length]
    mask = example.get("attention_mask")
    positions = integers("position_ids", example["position_ids"])
    positions = positions if mask is None else positions[torch.as_tensor(mask).bool()]
    begins = (positions == 0).nonzero().flatten().tolist()
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], length])]
    if not torch.equal(positions, document_positions(lengths)):
        raise ValueError(f"position_ids must count from 0 in every document, got {positions.tolist()}")
    return lengths


def document_positions(lengths: list[int]) -> Tensor:
    """Position ids that count from 0 in each of the documents of these lengths."""
    return torch.cat([torch.arange(length) for length in [0, *lengths]])
