"""``make soak``: random cases until the time is over or one fails; ``make soak ARGS="--case 123"`` repeats one."""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
from typing import Any

import torch
import triton_on_cpu  # first: Triton looks at its settings when kernels are defined

from soak.cases import draw
from soak.check import check, smaller
from soak.comparison import Margin

PROGRESS_SECONDS = 60


class Summary:
    """Counts of cases and the largest margins, by operator, backend and dtype."""

    def __init__(self) -> None:
        self.cases: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.largest: dict[tuple[str, ...], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def add(self, case: Any, found: dict[str, Margin]) -> None:
        key = (case.operator, case.backend, case.dtype)
        self.cases[key] += 1
        for margin in found.values():
            self.largest[key] = [max(pair) for pair in zip(self.largest[key], margin, strict=True)]

    def __str__(self) -> str:
        lines = [f"{'':60}{'cases':>8}{'of allowed':>12}{'of plain':>12}"]
        for key in sorted(self.cases):
            of_allowed, of_plain = self.largest[key]
            name = f"{key[0]:44}{key[1]:7}{key[2]:9}"
            lines.append(f"{name}{self.cases[key]:8}{of_allowed:12.2f}{of_plain:12.2f}")
        return "\n".join([*lines, f"{'all':60}{self.cases.total():8}"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--case", type=int, help="the number of the one case to check")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="the most cases")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--keep-going", action="store_true", help="past failing cases, which are then only named")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    if options.case is not None:
        options.first, options.cases = options.case, 1

    summary, failures = Summary(), 0
    begin = reported = time.monotonic()
    for number in range(options.first, options.first + options.cases):
        if time.monotonic() - begin > options.seconds:
            break
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            print(f"{summary.cases.total()} cases, {reported - begin:.0f} s", flush=True)
        case = draw(number)
        try:
            summary.add(case, check(case))
        except Exception as error:
            failures += 1
            print(f"case {number} fails: {error!r}\n    {case}", flush=True)
            if not options.keep_going:
                print(report(number, case, error))
                break
    print(summary)
    return 1 if failures else 0


def report(number: int, case: Any, error: Exception) -> str:
    """How to repeat a failing case, and a smaller one that fails alike."""
    machine = f"PTX_MACHINE={triton_on_cpu.ARCHITECTURE} " if triton_on_cpu.ARCHITECTURE else ""
    trace = [] if isinstance(error, AssertionError) else traceback.format_exception(error)
    lines = [
        *trace,
        f'Repeat it:  {machine}make soak ARGS="--case {number}"',
        "A smaller case that fails alike, to be run with PYTHONPATH=tests/support:tests/ptx_machine:tests/soak:",
        "    import triton_on_cpu",
        "    from soak.cases import *",
        "    from soak.check import check",
        f"    check({smaller(case, error)})",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
