"""A clock for pytest-benchmark that replays times measured before.

Contenders are timed in turn, A B C A B C ..., which pytest-benchmark cannot do: it finishes one case before it begins
the next. So :mod:`bench.measure` times them. Then pytest-benchmark measures empty functions with this clock, which
makes their rounds seem to take the measured times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate


class Replay:
    """Called at the start and at the end of each round, it returns times that lie that round's seconds apart."""

    def __init__(self) -> None:
        self.times: Iterator[float] = iter(())

    @contextmanager
    def rounds(self, seconds: list[float]) -> Iterator[None]:
        """Within this context the clock replays rounds of these lengths."""
        ends = list(accumulate(seconds))
        self.times = iter([time for start, end in zip([0.0, *ends], ends) for time in (start, end)])
        yield
        assert next(self.times, None) is None, "pytest-benchmark asked for fewer rounds than there are"

    def __call__(self) -> float:
        return next(self.times)


replay = Replay()
