"""Runs a function of a test in several processes: ``run(function, world_size, *arguments)``, with gloo on the CPU."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from checkout import leave_checkout

SECONDS = 240


def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Runs ``function(*arguments)`` in ``world_size`` processes of one group, and returns the result of each.

    The function must be one of a test module, which every process imports.

    Raises:
        AssertionError: a process failed, with its traceback, or died, or did not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    place = (function.__code__.co_filename, function.__name__)  # pytest imports test modules under names of its own
    processes = [
        context.Process(target=_process, args=(place, rank, world_size, port, answers, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + SECONDS
    try:
        while len(results) < world_size:
            try:
                rank, result, error = answers.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} died: exit codes {[processes[rank].exitcode for rank in dead]}"
                assert time.monotonic() < deadline, f"only ranks {sorted(results)} answered in {SECONDS} s"
                continue
            assert not error, f"rank {rank} of {world_size}:\n{error}"
            results[rank] = result
    finally:
        for process in processes:
            if len(results) < world_size:
                process.kill()
            process.join(30)
    return [results[rank] for rank in range(world_size)]


def _process(
    place: tuple[str, str], rank: int, world_size: int, port: int, answers: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or torch would put meshes and FSDP2's parameters on a GPU

    import torch
    import torch.distributed as dist
    import triton_on_cpu  # noqa: F401  (before kernels are defined, as in conftest.py)

    import patchkernels  # noqa: F401  (before the checkout leaves the path, as in conftest.py)

    leave_checkout()
    faulthandler.enable()  # prints where a crash happened
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    result, error = None, ""
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        file, name = place
        spec = importlib.util.spec_from_file_location(os.path.basename(file)[:-3], file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        result = getattr(module, name)(*arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    answers.put((rank, result, error))
    answers.close()
    answers.join_thread()
    os._exit(0)  # threads of gloo and torch that still run at exit have crashed finished processes
