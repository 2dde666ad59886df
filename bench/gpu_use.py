"""A pytest plugin that says which tests did not use the GPU: ``pytest -p bench.gpu_use``.

A test uses the GPU if it allocates memory there. What it starts in other processes does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

allocated: dict[str, bool] = {}  # by the test's id


def allocations() -> int:
    """The number of tensors that this process has allocated on all GPUs so far."""
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.memory_stats(index).get("allocation.all.allocated", 0) for index in devices)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = allocations()
    yield
    allocated[item.nodeid] = allocations() > before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    without = [test for test, used in allocated.items() if not used]
    terminalreporter.section(f"{len(without)} of {len(allocated)} tests did not use the GPU")
    for test in without:
        terminalreporter.line(test)
