"""Runs that are made at the same time are those that are made one after the other."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from experiments import lines_of, small_experiment, untimed

from patchkernels.experiment.laboratory import experiment
from patchkernels.experiment.side_by_side import OUTPUT_FILE, Call, call_side_by_side
from patchkernels.training.stop import OUT_OF_TIME, Stopped

# Like the preset "tiny", which the other processes do not have.
MODEL = "demo:hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2"


def side_by_side(calls, finished=lambda folder: None, jobs=2):
    call_side_by_side(calls, jobs, 1, finished)


def test_an_experiment_is_the_same_with_any_number_of_jobs(text, tmp_path):
    once = {"model": MODEL, "tune": False}
    one = experiment(small_experiment(text, tmp_path / "one", **once, jobs=1))
    two = experiment(small_experiment(text, tmp_path / "two", **once, jobs=2))
    assert untimed(two) == untimed(one)
    report = (two / "report.md").read_text()
    assert "2 runs were made at the same time" in report and "at the same time" not in (one / "report.md").read_text()
    outputs = [file.read_text() for file in two.glob(f"runs/*/{OUTPUT_FILE}")]
    assert len(outputs) == 6 and all("step     24/" in output or "step     48/" in output for output in outputs)


def test_after_a_signal_all_runs_are_saved_and_the_experiment_goes_on(text, tmp_path):
    config = small_experiment(text, tmp_path / "run", model=MODEL, tune=False, jobs=2)
    straight = experiment(dataclasses.replace(config, out=str(tmp_path / "straight")))

    def stop_early():
        while len(list(Path(config.out).glob("runs/*/checkpoints/step-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    (thread := threading.Thread(target=stop_early)).start()
    with pytest.raises(Stopped) as stopped:
        experiment(config)
    thread.join()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(lines_of(Path(config.out), "run")) < 6
    experiment(config)
    assert untimed(Path(config.out)) == untimed(straight)


def test_calls_share_the_jobs_and_print_into_their_folders(tmp_path):
    ended = []
    calls = [Call(tmp_path / str(n), print, lambda n=n: (f"call {n}",)) for n in range(5)]
    side_by_side(calls, ended.append)
    assert sorted(folder.name for folder in ended) == list("01234")
    assert [(tmp_path / str(n) / OUTPUT_FILE).read_text() for n in range(5)] == [f"call {n}\n" for n in range(5)]


def test_a_call_has_its_number_of_threads(tmp_path):
    call = Call(tmp_path, exec, lambda: ("import torch; print(torch.get_num_threads())",))
    call_side_by_side([call], 1, 3, lambda folder: None)
    assert (tmp_path / OUTPUT_FILE).read_text() == "3\n"


@pytest.mark.parametrize("before", ["nothing", "a stop"])
def test_a_signal_at_any_time_stops(tmp_path, before):
    """While the last result is taken, and after another run has stopped for lack of time: it goes to those that run."""

    def finished(folder):
        os.kill(os.getpid(), signal.SIGTERM)

    last = Call(tmp_path / "last", print, tuple)
    calls = [last]
    if before == "a stop":
        stopping = Call(tmp_path / "stop", exec, lambda: (f"raise SystemExit({OUT_OF_TIME})",))
        calls = [stopping, Call(tmp_path / "long", time.sleep, lambda: (600,)), last]
    began = time.monotonic()
    if before == "a stop":
        threading.Timer(12.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped) as stopped:
        side_by_side(calls, finished)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("end", ["failure", "error in finished"])
def test_when_one_fails_the_others_are_stopped(tmp_path, end):
    def finished(folder):
        raise KeyError("finished")

    short = Call(tmp_path / "short", os.chdir, lambda: ("missing",)) if end == "failure" else Call(
        tmp_path / "short", print, tuple)  # fmt: skip
    calls = [Call(tmp_path / "long", time.sleep, lambda: (600,)), short, Call(tmp_path / "never", print, tuple)]
    began = time.monotonic()
    error, message = (RuntimeError, "short failed: .*FileNotFoundError") if end == "failure" else (KeyError, "finished")
    with pytest.raises(error, match=message):
        side_by_side(calls, finished)
    assert time.monotonic() - began < 300 and not (tmp_path / "never").exists()


def test_when_the_time_is_over_no_call_begins(tmp_path):
    def over():
        raise Stopped(OUT_OF_TIME)

    calls = [Call(tmp_path / "first", print, tuple), Call(tmp_path / "second", print, over)]
    ended = []
    with pytest.raises(Stopped) as stopped:
        side_by_side(calls, ended.append)
    assert stopped.value.code == OUT_OF_TIME and ended == [tmp_path / "first"]
