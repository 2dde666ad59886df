"""The documentation is true: its Python runs, the commands that it shows exist, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from checkout import CHECKOUT

from patchkernels.cli import parse

README = CHECKOUT / "README.md"
PAGES = [README, CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
PAGES_WITH_PYTHON = [README, *(CHECKOUT / "docs" / f"{name}.md" for name in ("operators", "training", "dropin"))]


def lines_of(text: str, language: str) -> list[str]:
    """The lines of the code blocks in a language. All other lines are replaced by empty ones, to keep line numbers."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == f"```{language}" if fence else inside
    return lines


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program."""
    program = "\n".join(lines_of(page.read_text(encoding="utf-8"), "python"))
    assert program.strip()
    monkeypatch.chdir(tmp_path)
    exec(compile(program, page, "exec"), {"__name__": "__main__"})


def test_targets_of_make_exist() -> None:
    named = {page: set(re.findall(r"\bmake ([a-z-]+)", "\n".join(shown_in(page)))) for page in PAGES}
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"train", "test"} <= named[README]
    assert set().union(*named.values()) <= set(phony.split())


def shown_in(page: Path) -> list[str]:
    """The lines of a page's shell commands."""
    text = page.read_text(encoding="utf-8")
    return [line for language in ("bash", "sh") for line in lines_of(text, language) if line]


def test_commands_take_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        [argument for argument in shlex.split(command, comments=True) if argument != "..."]
        for page in PAGES
        for line in shown_in(page)
        for command in re.findall(r"(?:^|-m )patchkernels (.+)", line)
    ]
    for arguments in found:
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                parse(arguments)
        else:
            parse(arguments)
    assert {arguments[0] for arguments in found} == {"train", "plan", "corpus", "experiment"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link
