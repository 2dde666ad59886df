"""``python -m bench.ledger``: the table of all cases, or of one operator at a shape, on any machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bench import shapes
from bench.ledger import __doc__ as about
from bench.ledger import cases
from bench.ledger.cases import Case
from bench.ledger.counting import Count, Entry, Rates, count, seconds_of
from bench.ledger.measured import measure

# Sustained rates. The data sheets say 989 TFLOP/s, and 3.35 and 4.8 TB/s.
RATES = (Rates("H100", 700, 3.0), Rates("H200", 700, 4.3))
LINEAR = (
    (4096, 4096, 128256), (8192, 2048, 32000), (16384, 1024, 32000), (16384, 768, 50257), (2048, 2560, 151936),
    (16384, 4096, 128256),
)  # fmt: skip
LOGITS = ((8192, 32000), (16384, 50257), (4096, 128256))


class Operator(NamedTuple):
    """What the command line calls ``name``."""

    case: Callable[..., Case]
    settings: dict[str, Any]  # names and defaults, in the order of the arguments of ``case``


OPERATORS = {
    "linear": Operator(lambda *shape: cases.linear(shapes.Linear(*shape)), {"K": 4, "N": 4096, "D": 4096, "V": 128256}),
    "logits": Operator(lambda *shape: cases.logits(shapes.Logits(*shape)), {"K": 4, "N": 8192, "V": 32000}),
    "embedding": Operator(
        lambda k, v, d, tokens: cases.embedding(shapes.Embedding(k, v, d, "different", tokens)),
        {"K": 4, "V": 128256, "D": 4096, "NK": 65536},
    ),
    "step": Operator(
        lambda preset, rows, positions, k: cases.step(shapes.Step(preset, rows, positions), k),
        {"preset": "370m", "rows": 8, "positions": 2048, "K": 4},
    ),
}


def all_cases() -> list[Case]:
    """Those of the table in docs/performance.md."""
    return [
        *(cases.linear(shapes.Linear(4, *shape)) for shape in LINEAR),
        *(cases.logits(shapes.Logits(4, *shape)) for shape in LOGITS),
        *(cases.embedding(shapes.Embedding(k, 128256, 4096, "different", 65536)) for k in (1, 4)),
        *(cases.step(shapes.Step(preset, 8, 2048), k) for preset in ("370m", "1.3b") for k in (1, 4)),
    ]


def line(case: Case, found: Count, rates: Sequence[Rates], seconds: float | None) -> list[str]:
    """The cells of a pass of a contender."""
    least, work = case.floor[found.name], found.total()
    moved, least_moved = work.read + work.written, sum(w.read + w.written for w in least)
    cells = [
        case.operator, case.shape, found.contender, found.name, f"{work.launches:,}", f"{moved / 1e9:.3g}",
        f"{moved / least_moved:.2f}" if least_moved else "",
        "" if found.extra is None else f"{found.extra / 2**20:,.0f}",
    ]  # fmt: skip
    for rate in rates:
        time, floor = found.seconds(rate), sum(seconds_of(part, rate) for part in least)
        cells += [f"{time * 1e3:.3g}", f"{time / floor:.2f}"]
    return [*cells, *([f"{seconds * 1e3:.3g}"] if seconds is not None else [])]


def header(rates: Sequence[Rates], with_gpu: bool) -> list[str]:
    cells = ["operator", "shape", "contender", "pass", "launches", "GB moved", "/ least", "MiB beyond results"]
    for rate in rates:
        cells += [f"{rate.gpu} ms", "/ least"]
    return [*cells, *(["measured ms"] if with_gpu else [])]


def entry_lines(entries: Sequence[Entry], rates: Sequence[Rates]) -> list[list[str]]:
    """The cells of every operation."""
    return [
        [
            entry.name, " ".join("x".join(map(str, shape)) or "1" for shape in entry.shapes), f"{entry.work.launches}",
            f"{entry.work.read:,}", f"{entry.work.written:,}", f"{entry.work.flops:,}", f"{entry.held / 2**20:,.0f}",
            *(f"{entry.seconds(rate) * 1e6:.1f}" for rate in rates),
        ]
        for entry in entries
    ]  # fmt: skip


def as_table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def rates_from(text: str) -> Rates:
    """``H100:700:3.0``"""
    try:
        gpu, tflops, terabytes = text.split(":")
        rates = Rates(gpu, float(tflops), float(terabytes))
    except ValueError:
        raise argparse.ArgumentTypeError(f"rates look like H100:700:3.0 (TFLOP/s, TB/s), got {text!r}") from None
    if not (rates.tflops > 0 and rates.terabytes > 0):
        raise argparse.ArgumentTypeError(f"rates must be positive, got {text!r}")
    return rates


def case_from(parser: argparse.ArgumentParser, name: str, settings: list[str]) -> Case:
    """The case of an operator with ``settings`` such as ``N=4096``."""
    operator = OPERATORS[name]
    values = dict(operator.settings)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in values:
            parser.error(f"{name} has the settings {', '.join(f'{k}={v}' for k, v in values.items())}; got {setting!r}")
        try:
            values[key] = type(values[key])(value)
        except ValueError:
            parser.error(f"{key} must be an integer, got {value!r}")
        if values[key] in (0, "") or (isinstance(values[key], int) and values[key] < 0):
            parser.error(f"{key} must be at least 1, got {value!r}")
    try:
        return operator.case(*values.values())
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=about)
    parser.add_argument("operator", nargs="?", choices=OPERATORS, help="all cases without it")
    parser.add_argument("settings", nargs="*", help="of the operator, as N=4096; a wrong one lists them")
    parser.add_argument("--entries", action="store_true", help="print every operation too, in order")
    parser.add_argument("--rates", type=rates_from, nargs="+", default=RATES, metavar="GPU:TFLOPS:TERABYTES")
    chosen = parser.parse_args(arguments)
    with_gpu = torch.cuda.is_available()
    found = [case_from(parser, chosen.operator, chosen.settings)] if chosen.operator else all_cases()
    rows, entries = [header(chosen.rates, with_gpu)], []
    for case in found:
        for contender, make in case.contenders.items():
            seconds = measure(make) if with_gpu else {}
            for counted in count(make, contender):
                rows.append(line(case, counted, chosen.rates, seconds.get(counted.name)))
                title = f"{case.operator}, {case.shape}: {counted.contender}, {counted.name}"
                entries.append((title, entry_lines(counted.entries, chosen.rates)))
    print(as_table(rows))
    if chosen.entries:
        columns = ["operation", "shapes", "launches", "bytes read", "written", "FLOPs", "MiB held"]
        columns += [f"{rate.gpu} µs" for rate in chosen.rates]
        for title, lines in entries:
            print(f"\n{title}\n\n{as_table([columns, *lines])}")


if __name__ == "__main__":
    main(sys.argv[1:])
