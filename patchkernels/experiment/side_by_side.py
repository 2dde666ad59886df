"""Calls of functions side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from patchkernels.training.stop import OUT_OF_TIME, Stopped, StopRequest

OUTPUT_FILE = "output.txt"
SHOWN_LINES = 5  # of the output of a call that failed


class Call(NamedTuple):
    """One call that is to be made."""

    folder: Path  # for what it prints, and whatever else it writes
    function: Callable[..., None]  # one of a module, which the process imports
    arguments: Callable[[], tuple[Any, ...]]  # asked for when the call begins; may raise Stopped


def call_side_by_side(calls: Sequence[Call], jobs: int, threads: int, finished: Callable[[Path], None]) -> None:
    """Makes all calls, at most ``jobs`` at the same time, each with ``threads`` threads of torch.

    ``finished(folder)`` is called in this process as each call ends. A signal is passed on to all processes, which are
    waited for. What a call prints goes into ``output.txt`` in its folder.

    Raises:
        RuntimeError: a call failed, with the end of what it printed. The others are told to stop first.
        Stopped: a signal came, or a call stopped early.
    """
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    stop, waiting = StopRequest(None), deque(calls)
    running: dict[Any, tuple[Any, Path]] = {}  # the processes and folders, by what says that the process has ended
    failed: Path | None = None
    with stop.listening():
        try:
            while running or (waiting and not stop.code):
                while waiting and len(running) < jobs and not stop.code:
                    call = waiting.popleft()
                    try:
                        arguments = call.arguments()
                    except Stopped as stopped:
                        stop.code = int(stopped.code or OUT_OF_TIME)
                        break
                    process = context.Process(target=_make, args=(call.folder, call.function, arguments, threads))
                    process.start()
                    running[process.sentinel] = (process, call.folder)
                ended = multiprocessing.connection.wait(list(running), timeout=1.0)
                stop.code = stop.exit_code
                for sentinel in ended:
                    process, folder = running.pop(sentinel)
                    process.join()
                    if process.exitcode == 0:
                        finished(folder)
                    elif process.exitcode in (OUT_OF_TIME, 130, 143) or (stop.signalled and process.exitcode != 1):
                        stop.code = stop.code or int(process.exitcode or 0)
                    else:
                        failed, stop.code = folder, 1
                if stop.signalled or failed:
                    _tell_to_stop(running)
        except BaseException:
            _tell_to_stop(running)
            raise
        finally:
            for process, _ in running.values():
                process.join()
    if failed:
        lines = (failed / OUTPUT_FILE).read_text().splitlines()
        raise RuntimeError(f"{failed.name} failed: " + " / ".join(lines[-SHOWN_LINES:]))
    if stop.exit_code:
        raise Stopped(stop.exit_code)


def _tell_to_stop(running: dict[Any, tuple[Any, Path]]) -> None:
    for process, _ in running.values():
        process.terminate()


def _make(folder: Path, function: Callable[..., None], arguments: tuple[Any, ...], threads: int) -> None:
    """Makes a call in its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / OUTPUT_FILE, "a") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    torch.set_num_threads(threads)
    function(*arguments)
