"""What patches are worth against tokens a parameter: a table and a figure of several experiments.

    python -m bench.law OUT EXPERIMENT [EXPERIMENT ...]

Every EXPERIMENT is a folder that ``patchkernels experiment`` wrote, of which results.jsonl is read. OUT gets law.md and
law.png. Each arm is compared at the best of the learning rates that it was tried at, and over the seeds of all three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from patchkernels.experiment.comparison import (
    CONFIDENCE,
    TOKEN_LOSS,
    Groups,
    differences,
    mean_of,
    recovered_share,
    runs_at_best_rates,
)
from patchkernels.experiment.report import table
from patchkernels.files import replace_file


class Point(NamedTuple):
    """One experiment: a model, the data that it was trained on, and how its arms ended."""

    folder: Path
    parameters: int
    tokens_per_parameter: float  # of arm A
    groups: Groups  # the runs of A, B and C, each arm at its own best rate, of the seeds that all three have
    rates: int  # that every arm was tried at; the least of the three

    def gains(self) -> list[float]:
        """``L_C - L_B`` for each seed."""
        return differences(self.groups["C"], self.groups["B"])

    def rhos(self) -> list[float]:
        """ρ for each seed. Nothing if A is not better than C at all of them: a mean over some would mislead."""
        runs = zip(*(self.groups[arm] for arm in "ABC"))
        values = [recovered_share(*(float(run[TOKEN_LOSS]) for run in of_seed)) for of_seed in runs]
        return [] if None in values else [value for value in values if value is not None]


def read_point(folder: Path) -> Point:
    """Raises ``ValueError`` if the folder is no experiment, or lacks runs of A, B or C."""
    file = folder / "results.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder} holds no results.jsonl: expected the folder of an experiment")
    try:
        record, *lines = [json.loads(line) for line in file.read_text().splitlines()]
        parameters, tokens = record["parameters"], record["tokens"]
        results = [line for line in lines if line["kind"] == "run"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    groups = runs_at_best_rates(results)
    if missing := [arm for arm in "ABC" if arm not in groups]:
        raise ValueError(f"{folder} has no finished run of {', '.join(missing)}")
    seeds = set.intersection(*({run["seed"] for run in groups[arm]} for arm in "ABC"))
    common = {arm: [run for run in groups[arm] if run["seed"] in seeds] for arm in "ABC"}
    rates = min(len({run["lr"] for run in results if run["arm"] == arm}) for arm in "ABC")
    return Point(folder, parameters, tokens / parameters, common, rates)


def with_interval(values: list[float], form: str = "+.3f") -> str:
    """The mean, with its interval if there are several values."""
    mean = mean_of(values)
    if mean is None:
        return f"{values[0]:{form}}" if values else ""
    return f"{mean.value:{form}} ({mean.low:{form}} to {mean.high:{form}})"


def table_of(points: list[Point], out: Path) -> str:
    rows = []
    for point in points:
        gain = mean_of(point.gains())
        losses = [statistics.mean(run[TOKEN_LOSS] for run in point.groups[arm]) for arm in "ABC"]
        rows.append([
            f"{point.parameters:,}",
            f"[{point.tokens_per_parameter:.3g}]({link(point.folder, out)})",
            f"{point.groups['B'][0]['steps']:,}",
            str(len(point.gains())),
            str(point.rates),
            *(f"{loss:.3f}" for loss in losses),
            with_interval(point.gains()),
            f"{gain.p_value:.2g}" if gain else "",
            with_interval(point.rhos(), "+.2f"),
        ])  # fmt: skip
    columns = [
        "parameters",
        "tokens a parameter",
        "steps of B and C",
        "seeds",
        "rates tried",
        "A",
        "B",
        "C",
        "L_C - L_B",
        "p",
        "ρ",
    ]
    return table(columns, rows)


def link(folder: Path, out: Path) -> str:
    """The way from the table to an experiment's report."""
    return os.path.relpath(folder / "report.md", out)


def draw(points: list[Point], file: Path) -> None:
    """``L_C - L_B`` and ρ against tokens a parameter, a line for each model, with the intervals of the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: importing it takes long
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2)
    for axis, label, values_of in (
        (panels[0], "$L_C - L_B$ (above 0: patches win)", Point.gains),
        (panels[1], "ρ (1: as good as A)", Point.rhos),
    ):
        for number, parameters in enumerate(dict.fromkeys(point.parameters for point in points)):
            of_model = [point for point in points if point.parameters == parameters and values_of(point)]
            x = [point.tokens_per_parameter for point in of_model]
            y = [statistics.mean(values_of(point)) for point in of_model]
            intervals = [mean_of(values_of(point)) for point in of_model]
            errors = [interval.half_width if interval else 0.0 for interval in intervals]  # a single run has none
            axis.errorbar(x, y, errors, color=f"C{number}", marker="o", capsize=3, label=f"{parameters:,} parameters")
        means = [0.0] + [statistics.mean(values) for point in points if (values := values_of(point))]
        margin = 0.25 * (max(means) - min(means)) or 0.1
        axis.set_ylim(min(means) - margin, max(means) + margin)  # an interval of two seeds may reach far beyond
        axis.axhline(0, color="black", linewidth=0.8)
        if len(means) > 1:  # matplotlib has no logarithmic axis of nothing
            axis.set_xscale("log")
        axis.set_xlabel("tokens a parameter (A)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    replace_file(file, lambda path: figure.savefig(path, dpi=110, format="png"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.law", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("experiments", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    try:
        points = [read_point(folder) for folder in options.experiments]
    except ValueError as error:
        parser.error(str(error))
    points.sort(key=lambda point: (point.parameters, point.tokens_per_parameter))
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([
        "# Patches against tokens a parameter",
        "Token-level validation losses in nats, means over the seeds, each arm at the best of the learning rates that "
        "it was tried at with the first seed, which is also among the seeds of the mean. "
        f"In brackets: {CONFIDENCE:.0%} intervals of the means over seeds; p: of a paired t test of C against B. "
        "A: token-level, all data. B: patches, then token-level. C: token-level, B's compute. "
        "ρ = (L_C - L_B) / (L_C - L_A).",
        table_of(points, options.out),
        "![What patches are worth](law.png)",
    ])  # fmt: skip
    replace_file(options.out / "law.md", lambda path: path.write_text(text + "\n"))
    draw(points, options.out / "law.png")
    print(f"written: {options.out / 'law.md'} and law.png")


if __name__ == "__main__":
    main()
