"""The last lines of a test run say what was executed on the machine for PTX; ``conftest.py`` imports the hooks."""

from __future__ import annotations

from typing import Any

import pytest
import triton_on_cpu

if triton_on_cpu.ARCHITECTURE:
    from ptx_machine.driver import TALLIES, Tally


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist sends what it counted to the one that started it."""
    output = getattr(session.config, "workeroutput", None)
    if triton_on_cpu.ARCHITECTURE and output is not None:
        output["tallies"] = [
            (arch, tally.launches, sorted(tally.executed), sorted(tally.compiled), sorted(tally.forms))
            for arch, tally in TALLIES.items()
        ]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    for arch, launches, *sets in getattr(node, "workeroutput", {}).get("tallies", []):
        TALLIES[arch].add(Tally(launches, *map(set, sets)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if triton_on_cpu.ARCHITECTURE:
        for arch, tally in sorted(TALLIES.items()):
            terminalreporter.write_line(
                f"PTX of sm_{arch}: {tally.launches} launches of {len(tally.executed)} builds executed; "
                f"{len(tally.compiled)} builds compiled, of {len(tally.forms)} different instructions, all executable"
            )
