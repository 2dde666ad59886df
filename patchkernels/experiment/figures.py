"""The figures of an experiment's report, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchkernels.experiment.comparison import (
    SLOT_LOSSES,
    TOKEN_LOSS,
    Groups,
    Result,
    evaluation_at_switch,
    evaluations_side_by_side,
    is_token_level,
    mean_of,
)
from patchkernels.files import replace_file

AXES = (("raw_tokens", "raw tokens"), ("flops", "FLOPs (counted)"), ("seconds", "training seconds"))
EARLY = 0.08
"""Losses within this first share of the longest run's compute do not widen the vertical axis, because they start at
log V, far above all others."""


def draw_loss(file: Path, groups: Groups) -> None:
    """Token-level validation loss against raw tokens, FLOPs and seconds, every arm in its own colour.

    The line is the mean over the seeds, the band reaches from the lowest to the highest value, and the dot marks the
    end of the last patch phase.
    """
    figure, axes = _figure(columns=len(AXES), width=14, height=4.2)
    longest = max(run["flops"] for runs in groups.values() for run in runs)
    late_losses: list[float] = []  # the losses that the vertical axis has to show
    for axis, (key, label) in zip(axes, AXES):
        for number, (arm, runs) in enumerate(groups.items()):
            late_losses += _draw_arm(axis, key, runs, arm, f"C{number}", EARLY * longest)
        _label(axis, label)
    low, high = min(late_losses), max(late_losses)
    margin = 0.05 * (high - low) or 0.05
    axes[0].set_ylim(low - margin, high + margin)
    axes[0].set_ylabel("token-level validation loss")
    axes[0].legend()
    _save(figure, file)


def _draw_arm(axis: Any, key: str, runs: list[Result], arm: str, color: str, early_flops: float) -> list[float]:
    """Draws the arm's loss over ``key`` and returns the mean losses after ``early_flops``."""
    evaluations = [points for points in evaluations_side_by_side(runs) if points[0]["step"] > 0]
    x = [_mean([point[key] for point in points]) for points in evaluations]
    losses = [[point[TOKEN_LOSS] for point in points] for points in evaluations]
    means = [_mean(values) for values in losses]
    axis.plot(x, means, color=color, label=arm, linewidth=1.5)
    lowest, highest = [min(values) for values in losses], [max(values) for values in losses]
    axis.fill_between(x, lowest, highest, color=color, alpha=0.25, linewidth=0)
    switch = evaluation_at_switch(runs[0])
    for place, points in enumerate(evaluations):
        if switch and points[0]["step"] == switch["step"]:
            axis.plot([x[place]], [means[place]], "o", color=color, markersize=5)
    return [mean for mean, points in zip(means, evaluations) if points[0]["flops"] > early_flops]


def draw_cost(file: Path, groups: Groups) -> None:
    """The loss at the end against the compute as a share of A's: token-level arms as a line, each other arm as a point.

    The points are means over the seeds, and the bars the intervals of these means.
    """
    figure, (axis,) = _figure(columns=1, width=8, height=5)
    token_level: list[tuple[float, float]] = []
    for number, (arm, runs) in enumerate(groups.items()):
        cost, losses = runs[0]["flops"] / groups["A"][0]["flops"], [float(run[TOKEN_LOSS]) for run in runs]
        mean = mean_of(losses)
        error = None if mean is None else mean.half_width
        style: dict[str, Any] = {"color": "black"} if is_token_level(runs) else {"color": f"C{number}", "label": arm}
        axis.errorbar([cost], [_mean(losses)], yerr=error, marker="o", capsize=3, linestyle="none", **style)
        if is_token_level(runs):
            token_level.append((cost, _mean(losses)))
    axis.plot(*zip(*sorted(token_level)), color="black", label="token-level")
    axis.set_xlabel("compute, as a share of A's")
    axis.set_ylabel("token-level validation loss at the end")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    _save(figure, file)


def has_slot_losses(groups: Groups) -> bool:
    """Whether :func:`draw_slots` has anything to draw."""
    return any(evaluations_side_by_side(runs, SLOT_LOSSES) for runs in groups.values())


def draw_slots(file: Path, groups: Groups) -> None:
    """The loss of each slot in the patch phases: a panel per arm, the mean over the seeds, later slots paler."""
    of_arm = {arm: points for arm, runs in groups.items() if (points := evaluations_side_by_side(runs, SLOT_LOSSES))}
    figure, axes = _figure(columns=len(of_arm), width=5 * len(of_arm) + 1, height=4)
    for axis, (arm, evaluations) in zip(axes, of_arm.items()):
        evaluations = [points for points in evaluations if points[0]["step"] > 0]
        for number, size in enumerate(dict.fromkeys(len(points[0][SLOT_LOSSES]) for points in evaluations)):
            of_size = [points for points in evaluations if len(points[0][SLOT_LOSSES]) == size]
            x = [points[0]["raw_tokens"] for points in of_size]
            for slot in range(size):
                means = [_mean([point[SLOT_LOSSES][slot] for point in points]) for points in of_size]
                alpha, label = 1 - 0.8 * slot / size, f"K = {size}, slot {slot + 1}"
                axis.plot(x, means, color=f"C{number}", marker=".", alpha=alpha, label=label)
        axis.set_title(f"{arm}: patch-level losses", fontsize="medium")
        _label(axis, "raw tokens")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("validation loss of the slot\n(not comparable with token-level loss)")
    _save(figure, file)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of panels side by side that share their vertical axis, and the panels' axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: importing it takes long
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _label(axis: Any, label: str) -> None:
    """Names the horizontal axis and writes its numbers with k, M, G."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(label)
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.grid(alpha=0.3)


def _save(figure: Any, file: Path) -> None:
    replace_file(file, lambda path: figure.savefig(path, dpi=110, format="png"))
