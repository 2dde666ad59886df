"""Stopping a run early: after a signal or the deadline, all processes stop after the same finished step."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again


class Stopped(SystemExit):
    """The run stopped early. Its last step is saved.

    The exit code is 128 + the signal's number, or ``OUT_OF_TIME`` if the time was over.
    """


class StopRequest:
    """Whether a signal or the deadline asks the run to stop, and the exit code for that stop."""

    def __init__(self, minutes: float | None) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.received = 0  # exit code for the signal that this process has received
        self.code = 0  # that of the stop on which all processes have agreed

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, SIGTERM and SIGINT are recorded and do not end the process in the middle of a step.

        In a thread other than the main one, where Python allows no handlers of signals, they do what they did before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.received = 128 + number

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def flags(self) -> tuple[float, float]:
        """This process's requests: the first is nonzero after a signal, the second once the deadline has passed."""
        return float(self.received), float(time.monotonic() > self.deadline)

    def agree(self, signalled: float, late: float) -> None:
        """Sets the exit code from the flags of all processes, summed or averaged.

        A signal that only one process received, or the first clock past the deadline, thus stops all processes.
        """
        if not self.code:
            self.code = self.received or 128 + signal.SIGTERM if signalled else OUT_OF_TIME if late else 0

    @property
    def exit_code(self) -> int:
        """That of the signal which this process has received, or else of the agreed stop; 0 if there is neither."""
        return self.received or self.code

    @property
    def signalled(self) -> bool:
        return self.code not in (0, OUT_OF_TIME)

    @property
    def reason(self) -> str:
        return f"signal {self.code - 128}" if self.signalled else "out of time"
