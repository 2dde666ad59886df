"""What a run in phases measures between two entries of its log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from patchkernels.hf.modules import PatchStep
from patchkernels.numerics import IGNORE_INDEX


class Meters:
    """Counts raw tokens and seconds, and sums the losses of each slot of patch steps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.raw_tokens, self.begin = 0, time.perf_counter()
        self.slot_sums: Tensor | None = None  # (2, K): sums of losses and numbers of valid targets

    def add(self, raw_tokens: int, step: PatchStep | None) -> None:
        """Counts a batch; ``step`` is its patch step, or None if it had none."""
        self.raw_tokens += raw_tokens
        if step is not None and step.losses is not None:
            valid = step.target != IGNORE_INDEX
            sums = torch.stack([step.losses.sum((0, 1)).double(), valid.sum((0, 1)).double()])
            self.slot_sums = sums if self.slot_sums is None else self.slot_sums + sums

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside the block: evaluations and checkpoints do not count as training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.begin += time.perf_counter() - begin

    def read(self, accelerator: Any) -> dict[str, float]:
        """The entries of the log, over all processes, since the meters were cleared; clears them."""
        seconds = time.perf_counter() - self.begin
        entries = {"raw_tokens_per_second": self.raw_tokens * accelerator.num_processes / seconds}
        if self.slot_sums is not None:
            losses, counts = accelerator.reduce(self.slot_sums, "sum").tolist()
            for slot, (loss, count) in enumerate(zip(losses, counts), 1):
                entries[f"slot_loss_{slot}"] = loss / max(count, 1)
        self.clear()
        return entries
