"""The training set of a Trainer as rows of one run through all phases, and the collator that makes patches of them.

A row is what one position of a batch reads: in a phase of patch size K, K examples one after the other (equal
positions a step), or one example cut into patches (equal raw tokens a step). Which examples a row holds is a pure
function of its number, so that a run that skips the rows it has read goes on to the bit.
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

from patchkernels.patch_cross_entropy import next_patch_targets
from patchkernels.schedule import Phase, Schedule

IGNORED = -100


def example_schedule(phases: tuple[Phase, ...], examples: float, batch_size: int, convention: str) -> Schedule:
    """A schedule over examples in place of tokens; one counts as many tokens as every patch size can cut.

    Raises:
        ValueError: too few examples for a step in every phase.
    """
    unit = math.lcm(*(phase.patch_size for phase in phases))
    try:
        return Schedule(phases, round(examples * unit), batch_size, unit, convention)
    except ValueError as error:
        sizes = [phase.patch_size for phase in phases]
        raise ValueError(
            f"{examples:.0f} examples at {batch_size} rows a step leave a phase of {sizes} without a step"
        ) from error


def examples_of_steps(phases: tuple[Phase, ...], steps: int, batch_size: int, convention: str) -> float:
    """How many examples are read in so many steps."""
    cost = sum(phase.share / phase.patch_size for phase in phases) if convention == "positions" else 1.0
    return steps * batch_size / cost


class Rows:
    """Where a row's examples lie."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.total_steps * self.schedule.batch_size

    def examples(self, phase: Phase) -> int:
        """Examples a row."""
        return self.schedule.row_tokens(phase) // self.schedule.context

    def examples_before(self, step: int) -> int:
        """Examples that are read before a step."""
        return self.schedule.raw_tokens(step) // self.schedule.context

    def locate(self, row: int) -> tuple[Phase, int]:
        """The row's phase, and its first example in the order of reading."""
        step, within = divmod(row, self.schedule.batch_size)
        phase = self.schedule.phases[self.schedule.locate(step)[0]]
        return phase, self.examples_before(step) + within * self.examples(phase)


class PatchRows(Dataset[dict[str, Any]]):
    """Rows of a dataset that has a length; every epoch of it is permuted anew, or read in order."""

    def __init__(self, dataset: Any, schedule: Schedule, seed: int, shuffle: bool) -> None:
        if not len(dataset):
            raise ValueError("the training dataset is empty")
        self.dataset, self.rows, self.seed, self.shuffle = dataset, Rows(schedule), seed, shuffle

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        phase, first = self.rows.locate(row)
        places = range(first, first + self.rows.examples(phase))
        return join([self.dataset[self.index(place)] for place in places], phase.patch_size)

    def index(self, place: int) -> int:
        epoch, place = divmod(place, len(self.dataset))
        return int(self.order(epoch)[place]) if self.shuffle else place

    @functools.lru_cache(maxsize=2)  # noqa: B019  (lives as long as the run)
    def order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))


class PatchStream(IterableDataset[dict[str, Any]]):
    """Rows of a dataset that is only read in order, begun again where it ends."""

    def __init__(self, dataset: Iterable[dict[str, Any]], schedule: Schedule) -> None:
        self.dataset, self.rows = dataset, Rows(schedule)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        examples = self.forever()
        for row in range(len(self.rows)):
            phase, _ = self.rows.locate(row)
            yield join([next(examples) for _ in range(self.rows.examples(phase))], phase.patch_size)

    def forever(self) -> Iterator[dict[str, Any]]:
        while True:
            empty = True
            for example in self.dataset:
                empty = False
                yield example
            if empty:
                raise ValueError("the training dataset is empty")


def join(examples: list[dict[str, Any]], patch_size: int) -> dict[str, Any]:
    """Examples one after the other, without their padding."""
    ids, labels = [], []
    for example in examples:
        if "input_ids" not in example:
            raise ValueError(f"an example must hold input_ids, got {sorted(example)}")
        own = torch.as_tensor(example["input_ids"])
        given = torch.as_tensor(example["labels"]) if example.get("labels") is not None else own
        if own.ndim != 1 or given.shape != own.shape:
            raise ValueError(
                f"an example must hold input_ids (T) and labels (T), got {tuple(own.shape)} and {tuple(given.shape)}"
            )
        if example.get("attention_mask") is not None:
            kept = torch.as_tensor(example["attention_mask"]).bool()
            own, given = own[kept], given[kept]
        ids.append(own)
        labels.append(given)
    return {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "patch_size": patch_size}


class PatchCollator:
    """Features to a batch; rows of a patch phase bring ``shift_labels (B, P, K)``, by which the model knows its phase.

    Args:
        collate: makes a batch of features, ``labels`` among it; by default rows are padded on the right.
        pad_token_id: what they are padded with; such positions have no label.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any] | None = None, pad_token_id: int = 0) -> None:
        self.collate, self.pad_token_id = collate or self.pad, pad_token_id

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        sizes = {feature.get("patch_size", 1) for feature in features}
        if len(sizes) > 1:
            raise ValueError(f"the rows of a batch must be of one patch size, got {sorted(sizes)}")
        (size,) = sizes
        batch = dict(self.collate([{k: v for k, v in f.items() if k != "patch_size"} for f in features]))
        if size == 1:
            return batch
        if "labels" not in batch:
            raise ValueError(f"the collator must give labels, got {sorted(batch)}")
        short = -batch["input_ids"].shape[1] % size
        if short:
            length = batch["input_ids"].shape[1]
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.shape[1:] == (length,):
                    batch[name] = torch.nn.functional.pad(value, (0, short), value=fill.get(name, 0))
        batch["shift_labels"] = next_patch_targets(batch["labels"], size)
        return batch

    def pad(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not isinstance(features[0]["input_ids"], Sized):
            raise ValueError(f"input_ids must be a sequence of token ids, got {features[0]['input_ids']!r}")
        ids = [torch.as_tensor(feature["input_ids"]) for feature in features]
        labels = [torch.as_tensor(f["labels"]) if f.get("labels") is not None else i for f, i in zip(features, ids)]
        masks = [
            torch.as_tensor(f["attention_mask"]) if f.get("attention_mask") is not None else torch.ones_like(i)
            for f, i in zip(features, ids)
        ]
        stack = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = stack(masks, padding_value=0)
        batch = {
            "input_ids": stack(ids, padding_value=self.pad_token_id),
            "labels": stack(labels, padding_value=IGNORED).masked_fill(mask == 0, IGNORED),
        }
        return batch if bool(mask.all()) else {**batch, "attention_mask": mask}
