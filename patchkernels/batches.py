"""Which raw tokens a step reads: a pure function of the step, so that the data position is the step itself.

The text is cut into units, each a whole number of rows in every phase. Every epoch permutes the units anew; a phase
owns a range of them and permutes its rows, the units' equal parts. Each raw token is read once an epoch.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from patchkernels.data import Tokens
from patchkernels.schedule import Schedule


class Batches:
    """Rows of a token stream for every step of a schedule; rank r of W takes rows r, r + W, ..."""

    def __init__(
        self, tokens: Tokens, schedule: Schedule, seed: int, *, packed: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        self.units = len(tokens) // schedule.unit_tokens
        if self.units < 1:
            raise ValueError(f"the corpus has {len(tokens)} tokens, one row of the schedule {schedule.unit_tokens}")
        if schedule.batch_size % world_size:
            raise ValueError(f"batch_size must be divisible by {world_size} processes, got {schedule.batch_size}")
        self.tokens, self.schedule, self.seed, self.packed = tokens, schedule, seed, packed
        self.rank, self.world_size = rank, world_size

    def rows(self, step: int) -> list[int]:
        """The first token of each of the rank's rows."""
        index, within = self.schedule.locate(step)
        phase = self.schedule.phases[index]
        length = self.schedule.row_tokens(phase)
        parts = self.schedule.unit_tokens // length
        size = self.schedule.batch_size
        order = self._phase_order(index, self.schedule.steps[index] * size)
        first_unit = sum(
            -(-self.schedule.steps[i] * size * self.schedule.row_tokens(p) // self.schedule.unit_tokens)
            for i, p in enumerate(self.schedule.phases[:index])
        )
        starts = []
        for row in order[within * size + self.rank : (within + 1) * size : self.world_size]:
            unit, part = divmod(int(row), parts)
            epoch, place = divmod(first_unit + unit, self.units)
            starts.append(int(self._epoch_order(epoch)[place]) * self.schedule.unit_tokens + part * length)
        return starts

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """``input_ids (B, T)``, ``labels (B, T)`` and, packed, ``document_ids (B, T)``."""
        phase = self.schedule.phases[self.schedule.locate(step)[0]]
        return read_rows(self.tokens, self.rows(step), self.schedule.row_tokens(phase), self.packed)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (lives as long as the run)
    def _epoch_order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.units)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _phase_order(self, phase: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, 1, phase]).permutation(rows)


def read_rows(tokens: Tokens, starts: list[int], length: int, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as tensors; packed, the padding behind a document's end-of-text is no target."""
    ids = torch.from_numpy(np.stack([tokens.ids[start : start + length] for start in starts]).astype(np.int64))
    if not packed:
        return ids, ids, None
    places = np.asarray(starts)[:, None] + np.arange(length)
    documents = torch.from_numpy(np.searchsorted(tokens.document_starts, places, "right"))
    end_of_text = int(tokens.ids[-1])  # every stream closes with it
    previous = np.stack([tokens.ids[np.maximum(row - 1, 0)] for row in places]).astype(np.int64)
    padding = (ids == end_of_text) & (torch.from_numpy(previous) == end_of_text)
    begins = torch.from_numpy(np.isin(places, tokens.document_starts))
    return ids, ids.masked_fill(padding & ~begins, -100), documents


def validation_rows(tokens: Tokens, context: int, most: int) -> list[int]:
    """The same token-level rows in every phase: spread evenly over the held-out stream."""
    rows = len(tokens) // context
    if rows < 1:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, fewer than one context of {context}")
    return [i * rows // min(rows, most) * context for i in range(min(rows, most))]
