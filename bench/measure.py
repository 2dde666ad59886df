"""Measurements: times in interleaved rounds, peak memory, and errors against the eager definition."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], Any]
L2_BYTES = 2**28  # written between two timed calls: more than the L2 cache of any GPU holds
CYCLES = 2e9  # of a GPU's clock in a second, at most
MIN_ROUNDS, MAX_ROUNDS = 4, 30


def device_from(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device called ``name``. The program ends with a message if that is a GPU and torch sees none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: this needs a GPU, and torch sees none (--device cpu is for trying it out)\n")
    return device


def interleaved(functions: dict[str, Function], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """The seconds of each call, in rounds A B C A B C ..., so that a drift of the clocks affects all functions alike.

    ``seconds`` is about how long all rounds may take together. There are between ``MIN_ROUNDS`` and ``MAX_ROUNDS``
    rounds, after one for warming up that does not count. On CUDA the times are the device's, taken between
    events, and the L2 cache is flushed before each call.
    """
    timed = partial(_timed_on_cuda, {}) if device.type == "cuda" else _timed_on_cpu
    first = timed(functions)
    rounds = int(seconds / max(sum(first.values()), 1e-9))
    results = [timed(functions) for _ in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))]
    return {name: [result[name] for result in results] for name in functions}


def _timed_on_cpu(functions: dict[str, Function]) -> dict[str, float]:
    taken = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        taken[name] = time.perf_counter() - start
    return taken


def _timed_on_cuda(queueing: dict[str, float], functions: dict[str, Function]) -> dict[str, float]:
    """``queueing`` holds the seconds that the host took for each call in the last round, and gets those of this one."""
    events = {}
    for name, function in functions.items():
        flush_and_sleep(queueing.get(name, 0.0))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        function()
        queueing[name] = time.perf_counter() - began
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def flush_and_sleep(queueing: float) -> None:
    """Flushes the L2 cache, and lets the GPU wait twice as long as the host takes to queue what comes next."""
    torch.empty(L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    torch.cuda._sleep(int((1e-4 + 2 * queueing) * CYCLES))


def peak_extra_bytes(function: Function, device: torch.device) -> int:
    """The most memory that a call holds at a time beyond what was allocated before it, results included.

    Call the function once beforehand, so that one-time allocations do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del results
        return peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = function()
    del results
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def relative_errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """``|value - exact| / |exact|`` of each result, in the 2-norm."""
    assert len(results) == len(exact)
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(results, exact)]
    return [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]


def bytes_of(results: Any) -> int:
    """The size of the tensors that a call returned."""
    return sum(t.numel() * t.element_size() for t in results if isinstance(t, Tensor))
