"""The plot of a run's validation loss."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from patchkernels.files import replace_file
from patchkernels.training.log import read_log

AXES = {"raw_tokens": "raw tokens", "flops": "FLOPs (counted)", "seconds": "training seconds"}  # by key of the log


def plot(log: Path, file: Path) -> None:
    """Draws the validation loss against raw tokens, seconds and, where they are known, FLOPs. Dashed lines mark changes
    of phase.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    evaluated = [line for line in lines if "validation_loss" in line]
    switches = [line for line, following in pairwise(lines) if line["phase"] != following["phase"]]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = {key: label for key, label in AXES.items() if all(key in line for line in lines)}
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, (key, label) in zip(panels, axes.items()):
        losses = [line["validation_loss"] for line in evaluated]
        panel.plot([line[key] for line in evaluated], losses, marker=".", color="tab:blue")
        for line in switches:
            panel.axvline(line[key], color="tab:red", linestyle="--", linewidth=1, label="switch of phase")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("token-level validation loss")
    if switches:
        panels[0].legend()
    replace_file(file, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
