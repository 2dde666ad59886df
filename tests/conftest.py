"""Settings of every test: Triton's interpreter without a GPU, memory that is never zero by chance, a fixed seed."""

from __future__ import annotations

import pytest
import torch
import triton_on_cpu  # first: Triton looks at its settings when kernels are defined
from checkout import leave_checkout
from machine_summary import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401

import bench  # noqa: F401  # its modules can be imported after leaving the checkout too
import patchkernels  # noqa: F401

leave_checkout()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the machine for PTX, tests of the eager backend are left out: they reach no kernel."""
    if triton_on_cpu.ARCHITECTURE:
        eager = [item for item in items if getattr(item, "callspec", None) and _backend(item) == "eager"]
        config.hook.pytest_deselected(items=eager)
        items[:] = [item for item in items if item not in set(eager)]


def _backend(item: pytest.Function) -> str | None:
    return item.callspec.params.get("backend")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` is filled with NaN (or the largest integer), so that reading unwritten memory is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks():
    """Makes kernel blocks so small that small inputs are cut into several, of which the last is not full."""
    sizes = pytest.importorskip("small_blocks")  # imports the kernels, and they import Triton
    with sizes.small_blocks():
        yield
