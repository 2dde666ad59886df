"""How a run stops early: a signal or the clock asks for it, and every process stops after the same finished step."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType

OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again


class Stopped(SystemExit):
    """The run stopped early, after a step that is saved.

    The exit code is 128 + the signal's number, or ``OUT_OF_TIME`` where the minutes were over.
    """


class StopRequest:
    """Whether a signal or the clock asks the run to stop, and with which exit code it then stops."""

    def __init__(self, minutes: float | None) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.code = 0  # nothing asks for a stop yet

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block SIGTERM and SIGINT are noted here instead of ending the process in the middle of a step."""

        def note(number: int, frame: FrameType | None) -> None:
            self.code = 128 + number

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def flags(self) -> tuple[float, float]:
        """What this process asks for: not 0 where a signal came, and not 0 where the time is over."""
        return float(self.code), float(time.monotonic() > self.deadline)

    def agree(self, signalled: float, late: float) -> None:
        """Takes over the flags of all processes, added up or averaged.

        A signal that only one process received, or the first clock past the deadline, then stops all of them.
        """
        if not self.code:
            self.code = 128 + signal.SIGTERM if signalled else OUT_OF_TIME if late else 0

    @property
    def signalled(self) -> bool:
        return self.code not in (0, OUT_OF_TIME)

    @property
    def reason(self) -> str:
        return f"signal {self.code - 128}" if self.signalled else "out of time"
