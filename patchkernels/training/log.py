"""The log of a run, one JSON object per line. A crash loses at most the line that was being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from patchkernels.files import replace_file


class Log:
    """Appends lines to the file at ``path``, or writes nothing if that is None.

    A run that resumes at ``step`` keeps the lines up to that step and writes the later ones again. A new run keeps the
    log of another one, which left no checkpoint, under the name ``log.previous.jsonl``.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.file: TextIO | None = None
        if path is None:
            return
        if not step and path.exists():
            path.replace(path.with_suffix(".previous.jsonl"))
        kept = [line for line in read_log(path) if line["step"] <= step] if step and path.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(path, lambda temporary: temporary.write_text(text))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  (open as long as the run)

    def write(self, **values: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log. A last line that was cut off when the process was killed is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
