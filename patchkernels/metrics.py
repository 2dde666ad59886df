"""What a run says of itself: a JSONL log that survives crashes, a live display, and a plot at the end."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from patchkernels.data import Corpus, DataConfig, prepare


class Log:
    """One JSON object a line, or none without a path. A run resumed at a step writes the lines after it again."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.file: TextIO | None = None
        if path is None:
            return
        kept = [line for line in read_log(path) if line["step"] <= step] if step and path.exists() else []
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  (open as long as the run)

    def write(self, **values: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a kill may have left the last one half."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Display:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), console=self.console, transient=True, disable=quiet or not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total_steps)
        self.total = total_steps

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, values: dict[str, Any] | None) -> None:
        self.bar.update(self.task, completed=step)
        if values is None:
            return
        text = f"step {step:>6}/{self.total}  phase {values['phase']} (K={values['patch_size']})"
        if "loss" in values:  # not before the first step
            text += f"  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
            text += f"  {values['raw_tokens_per_second']:,.0f} raw tokens/s"
        if "validation_loss" in values:
            text += f"  validation {values['validation_loss']:.4f}"
        self.console.print(text, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def plot(log: Path, file: Path) -> None:
    """Validation loss against raw tokens, counted FLOPs and seconds; a dashed line where the phase changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    points = [line for line in lines if "validation_loss" in line]
    switches = [a for a, b in pairwise(lines) if a["phase"] != b["phase"]]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, key, label in zip(
        axes, ("raw_tokens", "flops", "seconds"), ("raw tokens", "FLOPs (counted)", "training seconds")
    ):
        axis.plot([p[key] for p in points], [p["validation_loss"] for p in points], marker=".", color="tab:blue")
        for line in switches:
            axis.axvline(line[key], color="tab:red", linestyle="--", linewidth=1, label="switch of phase")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("token-level validation loss")
    if switches:
        axes[0].legend()
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(file)


def prepare_aloud(data: DataConfig, console: Console) -> Corpus:
    """:func:`patchkernels.data.prepare`, which says what it is at."""
    console.print(f"preparing the corpus: {data.path or 'the standard library of this Python'}", soft_wrap=True)
    with console.status("reading") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what} {f'{done:,}' if done else ''}{f' of {total:,} documents' if total else ''}")

        return prepare(data, progress)
