"""The plot of a run's validation losses."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from patchkernels.files import replace_file
from patchkernels.training.log import read_log

AXES = {"raw_tokens": "raw tokens", "flops": "FLOPs (counted)", "seconds": "training seconds"}  # by key of the log
SLOTS = "validation_slot_losses"  # the losses of a patch step on the held-out rows, one for each token of a patch


def plot(log: Path, file: Path) -> None:
    """Draws the validation loss against raw tokens, seconds and, where they are known, FLOPs.

    The phases are named by their patch size, with a dashed line between them. In patch phases thin lines show the loss
    that is trained there, for each of the K tokens of the next patch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    evaluated = [line for line in lines if "validation_loss" in line]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = {key: label for key, label in AXES.items() if all(key in line for line in lines)}
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, (key, label) in zip(panels, axes.items()):
        losses = [line["validation_loss"] for line in evaluated]
        panel.plot([line[key] for line in evaluated], losses, marker=".", color="tab:blue", label="token-level")
        _draw_slots(panel, evaluated, key)
        _name_phases(panel, lines, key)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss")
    if any(SLOTS in line for line in evaluated):
        panels[0].legend(fontsize="small")
    replace_file(file, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _draw_slots(panel: Any, evaluated: list[dict[str, Any]], key: str) -> None:
    """Draws the losses of the slots of every patch phase."""
    for index, (patch_size, lines) in enumerate(_phases([line for line in evaluated if SLOTS in line])):
        for slot in range(patch_size):
            panel.plot(
                [line[key] for line in lines],
                [line[SLOTS][slot] for line in lines],
                color="tab:orange",
                linewidth=0.8,
                alpha=1 - 0.7 * slot / patch_size,
                label="patches, slot 1 (dark) to K" if index == slot == 0 else None,
            )


def _name_phases(panel: Any, lines: list[dict[str, Any]], key: str) -> None:
    """Writes the patch size of each phase above it, and draws a line where it ends and another one begins."""
    begin = lines[0][key]
    phases = _phases(lines)
    for number, (patch_size, of_phase) in enumerate(phases, 1):
        end = of_phase[-1][key]
        panel.annotate(
            f"K = {patch_size}",
            ((begin + end) / 2, 1.01),
            xycoords=panel.get_xaxis_transform(),
            ha="center",
            va="bottom",
        )
        if number < len(phases):
            panel.axvline(end, color="tab:red", linestyle="--", linewidth=1)
        begin = end


def _phases(lines: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """The lines of each phase, with its patch size."""
    groups = groupby(lines, key=lambda line: (line["phase"], line["patch_size"]))
    return [(patch_size, list(of_phase)) for (_, patch_size), of_phase in groups]
