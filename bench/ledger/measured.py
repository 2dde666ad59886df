"""The seconds that a call really takes, where there is a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ledger.cases import Call
from bench.measure import flush_and_sleep

ROUNDS, WARM_UP = 7, 2


def measure(make: Callable[[], Call]) -> dict[str, float]:
    """The median seconds of each pass on the GPU, between events; inputs are new in every round, and caches cold."""
    found: dict[str, list[float]] = {}
    queueing: dict[str, float] = {}
    for number in range(WARM_UP + ROUNDS):
        for name, (start, end) in _events(make(), queueing).items():
            if number >= WARM_UP:
                found.setdefault(name, []).append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def _events(call: Call, queueing: dict[str, float]) -> dict[str, tuple[Any, Any]]:
    """The events before and after each pass, all of which are over; ``queueing`` as in :mod:`bench.measure`."""
    events: dict[str, tuple[Any, Any]] = {}
    passes = call(_backward)
    name = next(passes)
    while name:
        flush_and_sleep(queueing.get(name, 0.0))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        following = next(passes, "")
        queueing[name] = time.perf_counter() - began
        end.record()
        events[name] = start, end
        name = following
    torch.cuda.synchronize()
    return events


def _backward(out: Tensor, upstream: Tensor | None) -> None:
    out.backward(upstream)
