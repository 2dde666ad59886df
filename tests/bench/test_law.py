"""The table and the figure of several experiments, from results that are made up."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from checkout import CHECKOUT

from bench import law
from patchkernels.experiment.comparison import Mean, mean_of
from patchkernels.training.evidence import OBSERVATIONS

DOCS = CHECKOUT / "docs"


def test_the_observations_of_plan_are_those_of_the_published_experiments():
    """Every experiment that the table in bench/results names, as ``plan`` knows it."""
    folder = CHECKOUT / "bench" / "results" / "amd-epyc" / "law"
    reports = re.findall(r"\]\(([^)]*)/report\.md\)", (folder / "law.md").read_text())
    expected = set()
    for report in reports:
        point = law.read_point(folder / report)
        gains = point.gains()
        mean = mean_of(gains) or Mean(gains[0], gains[0], gains[0], math.nan)
        tokens = float(f"{point.tokens_per_parameter:.3g}")
        expected.add((point.parameters, tokens, len(gains), *(round(value, 3) for value in mean[:3])))
    assert set(map(tuple, OBSERVATIONS)) == expected
    points = [law.read_point(folder / report) for report in reports]
    table = law.table_of(points, folder)
    assert table in (folder / "law.md").read_text(), "the table is that of the results"
    in_docs = re.sub(r"\]\((.*?)/report", lambda found: f"]({os.path.relpath(folder / found[1], DOCS)}/report", table)
    assert in_docs in (DOCS / "method.md").read_text()


def write_experiment(folder: Path, parameters: int, tokens: int, losses: dict[tuple[str, float], list[float]]) -> Path:
    """``losses``: of an arm at a learning rate, one for each seed."""
    folder.mkdir(parents=True)
    lines = [{"kind": "experiment", "parameters": parameters, "tokens": tokens}] + [
        {"kind": "run", "arm": arm, "seed": seed, "lr": lr, "steps": 7, "validation_loss": loss}
        for (arm, lr), of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_table_and_figure(tmp_path):
    """C is best at another rate than A and B, and A has one seed more. The second has one seed, and A worse than C."""
    many = write_experiment(
        tmp_path / "results" / "many",
        1000,
        330_000,
        {
            ("A", 1.0): [1.0, 1.1, 1.2, 9.0], ("B", 1.0): [1.5, 1.6, 1.9], ("C", 1.0): [2.5],
            ("C", 2.0): [2.0, 2.1, 2.2],
        },
    )  # fmt: skip
    few = write_experiment(
        tmp_path / "results" / "few", 1000, 17_000, {("A", 1.0): [4.0], ("B", 1.0): [3.8], ("C", 1.0): [3.5]}
    )
    out = tmp_path / "results" / "law"
    law.main([str(out), str(many), str(few)])
    rows = [line.split(" | ") for line in (out / "law.md").read_text().splitlines() if line.startswith("| 1,000")]
    assert [row[1] for row in rows] == ["[17](../few/report.md)", "[330](../many/report.md)"], "few tokens first"
    assert rows[0][3:] == ["1", "1", "4.000", "3.800", "3.500", "-0.300", "", " |"]
    assert rows[1][3:8] == ["3", "1", "1.100", "1.667", "2.100"]
    # by seed: 0.5, 0.5 and 0.3; t = 4.3027 for 95 % with 2 degrees of freedom
    assert rows[1][8:10] == ["+0.433 (+0.146 to +0.720)", "0.023"]
    assert rows[1][10] == "+0.43 (+0.15 to +0.72) |"
    assert (out / "law.png").read_bytes().startswith(b"\x89PNG")


def test_folders_that_are_no_experiments(tmp_path, capsys):
    law.main([str(tmp_path / "one"), str(write_experiment(tmp_path / "x", 1, 1, {(a, 1.0): [1.0] for a in "ABC"}))])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "results.jsonl").write_text("")
    lacking = write_experiment(tmp_path / "lacking", 1, 1, {("A", 1.0): [1.0], ("B", 1.0): [1.0]})
    cases = (
        (tmp_path, "holds no results.jsonl"), (lacking, "no finished run of C"),
        (tmp_path / "empty", "results.jsonl is damaged"),
    )  # fmt: skip
    for folder, words in cases:
        with pytest.raises(SystemExit):
            law.main([str(tmp_path / "out"), str(folder)])
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
