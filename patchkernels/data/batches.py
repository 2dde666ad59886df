"""The tokens that each step reads. They depend on the step alone, so a resumed run needs no position in the data.

The text is cut into pieces of equal length, each a whole number of rows in every phase. Every epoch reads the pieces in
a new random order. A phase takes as many of the next pieces as it needs, cuts each into rows, and reads the rows in a
random order of its own. So each token is read once per epoch, whatever the phases are.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchkernels.data.corpus import Tokens
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import Schedule

Rows = tuple[Tensor, Tensor, Tensor | None]  # token ids, labels and, if documents are packed, document ids; each (B, T)

# The second number of a random generator's seed, which keeps the two kinds of orders independent.
PIECES_OF_EPOCH = 0
ROWS_OF_PHASE = 1


class Batches:
    """The rows of a token stream that each step of a schedule reads.

    The process of rank r reads the rows r, r + ``world_size``, ... of every batch.

    Raises:
        ValueError: there are fewer tokens than a piece has, or the processes cannot share a batch equally.
    """

    def __init__(
        self, tokens: Tokens, schedule: Schedule, seed: int, *, packed: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        self.piece_count = len(tokens) // schedule.piece_tokens
        if self.piece_count < 1:
            raise ValueError(f"the corpus has {len(tokens)} tokens, one row of the schedule {schedule.piece_tokens}")
        if schedule.batch_size % world_size:
            raise ValueError(f"batch_size must be divisible by {world_size} processes, got {schedule.batch_size}")
        self.tokens, self.schedule, self.seed, self.packed = tokens, schedule, seed, packed
        self.rank, self.world_size = rank, world_size
        self.labels_are_ids = not packed

    def row_starts(self, step: int) -> list[int]:
        """The positions in the stream at which this process's rows of a step begin."""
        schedule = self.schedule
        phase_index, step_of_phase = schedule.locate(step)
        row_tokens = schedule.row_tokens(schedule.phases[phase_index])
        rows_per_piece = schedule.piece_tokens // row_tokens
        rows_of_phase = schedule.steps[phase_index] * schedule.batch_size
        order = _permutation(self.seed, ROWS_OF_PHASE, phase_index, rows_of_phase)
        first_piece = self._pieces_before(phase_index)
        batch_start = step_of_phase * schedule.batch_size
        starts = []
        for row in order[batch_start + self.rank : batch_start + schedule.batch_size : self.world_size]:
            piece, row_of_piece = divmod(int(row), rows_per_piece)
            epoch, place = divmod(first_piece + piece, self.piece_count)
            piece_in_text = int(_permutation(self.seed, PIECES_OF_EPOCH, epoch, self.piece_count)[place])
            starts.append(piece_in_text * schedule.piece_tokens + row_of_piece * row_tokens)
        return starts

    def _pieces_before(self, phase_index: int) -> int:
        """The number of pieces that earlier phases take. A piece that a phase reads only in part counts as taken."""
        schedule = self.schedule
        return sum(
            -(-steps * schedule.batch_size * schedule.row_tokens(phase) // schedule.piece_tokens)
            for phase, steps in zip(schedule.phases[:phase_index], schedule.steps)
        )

    def batch(self, step: int) -> Rows:
        """``input_ids (B, T)``, ``labels (B, T)`` and, if documents are packed, ``document_ids (B, T)``."""
        phase = self.schedule.phases[self.schedule.locate(step)[0]]
        return read_rows(self.tokens, self.row_starts(step), self.schedule.row_tokens(phase), self.packed)


# A step uses one order of rows, and the orders of pieces of all epochs that its phase reads.
@functools.lru_cache(maxsize=16)
def _permutation(seed: int, kind: int, index: int, length: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, kind, index]).permutation(length)


def read_rows(tokens: Tokens, starts: list[int], length: int, packed: bool) -> Rows:
    """``input_ids``, ``labels`` and ``document_ids`` of rows of ``length`` tokens, each ``(len(starts), length)``.

    Without ``packed`` the labels are the ids and there are no document ids. With it, the labels
    of the padding after a document's end-of-text are ``IGNORE_INDEX``.
    """
    ids = torch.from_numpy(np.stack([tokens.ids[start : start + length] for start in starts]).astype(np.int64))
    if not packed:
        return ids, ids, None
    places = np.asarray(starts)[:, None] + np.arange(length)  # positions of the rows' tokens in the stream
    document_ids = torch.from_numpy(np.searchsorted(tokens.document_starts, places, "right"))
    end_of_text = int(tokens.ids[-1])  # every document is closed by it, so the stream ends with it
    previous = np.stack([tokens.ids[np.maximum(row - 1, 0)] for row in places]).astype(np.int64)
    repeated = (ids == end_of_text) & (torch.from_numpy(previous) == end_of_text)
    begins = torch.from_numpy(np.isin(places, tokens.document_starts))  # an empty document begins with end-of-text
    return ids, ids.masked_fill(repeated & ~begins, IGNORE_INDEX), document_ids


def validation_rows(tokens: Tokens, context: int, most: int) -> list[int]:
    """The positions where at most ``most`` rows of ``context`` tokens begin, spread evenly over the held-out stream.

    The rows are the same in every phase, because the validation loss is always token-level.

    Raises:
        ValueError: the stream is shorter than one row.
    """
    rows = len(tokens) // context
    if rows < 1:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, fewer than one context of {context}")
    return [i * rows // min(rows, most) * context for i in range(min(rows, most))]
