"""The experiment's folder: results that are kept, folders of other experiments, and damaged files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from checkout import CHECKOUT
from experiments import laboratory_of, lines_of

from patchkernels.experiment.config import ARM_NAMES
from patchkernels.experiment.laboratory import experiment
from patchkernels.training.run import Run
from patchkernels.training.stop import OUT_OF_TIME, Stopped


def test_the_record_is_as_in_folders_of_before(config):
    """Older folders must stay valid, so that an unfinished experiment in them can go on and report its settings."""
    file = CHECKOUT / "bench" / "results" / "intel-xeon" / "experiment" / "experiment.json"
    before, record = json.loads(file.read_text()), laboratory_of(config).record
    assert [name for name in record if name != "jobs"] == list(before), "the report has a default for the jobs"
    assert {part: list(record[part]) for part in ("budget", "corpus", "versions")} == {
        part: list(before[part]) for part in ("budget", "corpus", "versions")
    }
    assert {name: arm for name, arm in record["arms"].items() if name in before["arms"]} == before["arms"]


def test_arms_that_a_folder_of_before_did_not_know_can_be_added(config):
    once = dataclasses.replace(config, tune=False, seeds=1, tokens=2400.0)
    out = experiment(once)
    file = out / "experiment.json"
    record = json.loads(file.read_text())
    record["arms"] = {name: record["arms"][name] for name in ("A", "B", "C")}
    file.write_text(json.dumps(record))
    experiment(dataclasses.replace(once, arms=("A", "B", "C", "1:0.75")))
    experiment(once)
    with pytest.raises(ValueError, match=r"another experiment \(.*piece_tokens: 128 there, 384 here"):
        experiment(dataclasses.replace(once, arms=("A", "B", "C", "3:1/2,1:1/2")))
    assert "| 1:0.75 |" in (out / "report.md").read_text(), "also where it is not asked for"
    assert json.loads(file.read_text())["arms"]["1:0.75"]["share"] == 0.75


def test_arms_may_be_left_out_later(config):
    """Patches of 3 make the pieces longer, which they then are without them too."""
    once = dataclasses.replace(config, tune=False, seeds=1, tokens=2400.0)
    experiment(dataclasses.replace(once, arms=("A", "B", "C", "3:1/2,1:1/2")))
    before = lines_of(Path(config.out), "run")
    experiment(once)
    assert lines_of(Path(config.out), "run") == before


def test_what_is_finished_stays_in_the_report(config):
    experiment(dataclasses.replace(config, seeds=1, arms=("A", "B", "C", "multi")))
    before = {(run["arm"], run["seed"], run["lr"]) for run in lines_of(Path(config.out), "run")}
    assert len(before) >= 9
    for later in ({"arms": ARM_NAMES, "seeds": 3, "minutes": 1e-9}, {"seeds": 1}):
        with contextlib.suppress(Stopped):
            experiment(dataclasses.replace(config, **later))
        assert {(run["arm"], run["seed"], run["lr"]) for run in lines_of(Path(config.out), "run")} == before


def test_the_text_may_be_named_otherwise_when_it_goes_on(config, tmp_path, monkeypatch):
    once = dataclasses.replace(config, tune=False, seeds=1)
    with monkeypatch.context() as patch:
        step = Run.train_step
        patch.setattr(
            Run, "train_step", lambda self, rows: (setattr(self.stop, "code", OUT_OF_TIME), step(self, rows))[1]
        )
        with pytest.raises(Stopped):
            experiment(once)
    assert list(Path(config.out).glob("runs/A-*/checkpoints/*"))
    link = tmp_path / "elsewhere"
    link.symlink_to(config.data.path)
    experiment(dataclasses.replace(once, data=dataclasses.replace(config.data, path=str(link))))


def test_a_folder_of_another_experiment_is_left_alone(config):
    once = dataclasses.replace(config, tune=False, seeds=1)
    out = experiment(once)
    before = {name: (out / name).read_bytes() for name in ("experiment.json", "results.jsonl", "report.md")}
    for change in ({"warmup": 0.2}, {"phases": "2:1/2,1:1/2"}, {"tokens": 3072.0}):
        with pytest.raises(ValueError, match=rf"holds another experiment .*{next(iter(change))}"):
            experiment(dataclasses.replace(once, **change))
    assert before == {name: (out / name).read_bytes() for name in before}


@pytest.mark.parametrize("name", ["experiment.json", "result.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_results_are_named(config, name, content):
    once = dataclasses.replace(config, tune=False, seeds=1)
    file = next(experiment(once).rglob(name))
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} is damaged .*: remove it"):
        experiment(once)
    file.unlink()
    experiment(once)
