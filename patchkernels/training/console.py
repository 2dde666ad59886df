"""The terminal output of a run, while the corpus is prepared and while the model trains."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from patchkernels.data.corpus import Corpus, DataConfig, prepare


class Display:
    """A progress bar and lines of text on a terminal; only the lines where the output is not a terminal."""

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self.total_steps = total_steps
        self.console = Console(quiet=quiet)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), console=self.console, transient=True, disable=quiet or not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total_steps)

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, values: dict[str, Any] | None) -> None:
        """Moves the bar, and prints a line if there are logged values to show."""
        self.bar.update(self.task, completed=step)
        if values is None:
            return
        text = f"step {step:>6}/{self.total_steps}  phase {values['phase']} (K={values['patch_size']})"
        if "loss" in values:  # the values before the first step hold no training loss
            text += f"  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
            text += f"  {values['raw_tokens_per_second']:,.0f} raw tokens/s"
            text += f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        if "validation_loss" in values:
            text += f"  validation {values['validation_loss']:.4f}"
        self.say(text)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def prepare_aloud(data: DataConfig, console: Console, *, document_multiple: int = 1) -> Corpus:
    """Calls :func:`patchkernels.data.corpus.prepare` and shows its progress on the console."""
    console.print(f"preparing the corpus: {data.path or 'the standard library of this Python'}", soft_wrap=True)
    with console.status("reading") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what} {f'{done:,}' if done else ''}{f' of {total:,} documents' if total else ''}")

        return prepare(data, progress, document_multiple=document_multiple)
