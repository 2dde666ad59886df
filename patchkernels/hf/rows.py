"""A training set as the rows of one run through all phases, and the collator that cuts a batch of rows into patches.

A row is one entry of a batch. With constant positions per step it is K examples one after the other in a phase of patch
size K; with constant raw tokens per step it is one example. Which examples a row holds depends only on its number, so
that a run that skips the rows it has read continues bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from patchkernels.numerics import IGNORE_INDEX
from patchkernels.ops.targets import next_patch_targets
from patchkernels.schedule import Phase, Schedule, cost_of


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
        while True:
            empty = True
            for example in self.dataset:
                empty = False
                yield example
            if empty:
                raise ValueError("the training dataset is empty")


def join(examples: list[dict[str, Any]], patch_size: int) -> dict[str, Any]:
    """One row: the examples one after the other without their padding, and the patch size of its phase."""
    pairs = [unpadded(example) for example in examples]
    return {
        "input_ids": torch.cat([ids for ids, _ in pairs]),
        "labels": torch.cat([labels for _, labels in pairs]),
        "patch_size": patch_size,
    }


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
    ids = torch.as_tensor(example["input_ids"])
    labels, mask = example.get("labels"), example.get("attention_mask")
    labels = ids if labels is None else torch.as_tensor(labels)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    return ids, labels, mask


class PatchCollator:
    """Makes a batch of rows. In a patch phase it adds ``shift_labels`` (B, P, K), which make it a patch step.

    Args:
        collate: turns a list of rows into a batch with ``labels``. By default rows are padded on the right.
        pad_token_id: the token of the padding, whose labels are ignored.

    Raises:
        ValueError: rows of several patch sizes, or a ``collate`` that gives no labels.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any] | None = None, pad_token_id: int = 0) -> None:
        self.collate, self.pad_token_id = collate or self.pad_right, pad_token_id

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        patch_sizes = {row.get("patch_size", 1) for row in rows}
        if len(patch_sizes) > 1:
            raise ValueError(f"the rows of a batch must be of one patch size, got {sorted(patch_sizes)}")
        (patch_size,) = patch_sizes
        batch = dict(self.collate([{name: row[name] for name in row if name != "patch_size"} for row in rows]))
        if patch_size == 1:
            return batch
        if "labels" not in batch:
            raise ValueError(f"the collator must give labels, got {sorted(batch)}")
        self.fill_last_patch(batch, patch_size)
        batch["shift_labels"] = next_patch_targets(batch["labels"], patch_size)
        return batch

    def fill_last_patch(self, batch: dict[str, Any], patch_size: int) -> None:
        """Pads every tensor (B, T) of the batch on the right until T is divisible by the patch size."""
        length = batch["input_ids"].shape[1]
        missing = -length % patch_size
        if not missing:
            return
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.shape[1:] == (length,):
                batch[name] = torch.nn.functional.pad(value, (0, missing), value=fill.get(name, 0))

    def pad_right(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not isinstance(rows[0]["input_ids"], Sized):
            raise ValueError(f"input_ids must be a sequence of token ids, got {rows[0]['input_ids']!r}")
        ids, labels, masks = (list(tensors) for tensors in zip(*(unpack(row) for row in rows)))
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = pad(masks, padding_value=False)
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "labels": pad(labels, padding_value=IGNORE_INDEX).masked_fill(~mask, IGNORE_INDEX),
        }
        return batch if bool(mask.all()) else {**batch, "attention_mask": mask.long()}
