"""The README is true: its Python runs, top to bottom, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import CHECKOUT

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def python_of(text: str) -> str:
    """Its ```python blocks as one program, every line where it stands in the text; empty lines for the rest."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = python_of(README)
    assert program.strip()
    monkeypatch.chdir(tmp_path)
    exec(compile(program, CHECKOUT / "README.md", "exec"), {"__name__": "__main__"})


def test_targets_of_make_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"train", "test"} <= named <= set(phony.split())
