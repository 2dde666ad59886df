"""A run that crashed, was killed or stopped anywhere goes on as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import CHECKOUT
from small_runs import assert_same_run, changed

from patchkernels.data.batches import Batches
from patchkernels.training import train as train_module
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.config import TrainConfig
from patchkernels.training.log import read_log
from patchkernels.training.stop import OUT_OF_TIME, Stopped
from patchkernels.training.train import train


def stop_at(monkeypatch, step: int) -> None:
    """Makes a run crash as the given step begins, when it reads its batch."""
    read = Batches.batch

    def batch(self, at):
        if at == step:
            raise KeyboardInterrupt
        return read(self, at)

    monkeypatch.setattr(Batches, "batch", batch)


@pytest.mark.parametrize("at", [2, 7, 8, 9, 20])
@pytest.mark.parametrize("switch", ["carry", "reset"])
def test_resumed_is_as_if_nothing_had_happened(config, tmp_path, monkeypatch, at, switch):
    config = changed(config, optimizer_at_switch=switch, save_every=1)
    straight = train(changed(config, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert_same_run(train(changed(config, resume=True)), straight)


SCRIPT = """
import pickle, sys
from small_runs import TINY
from patchkernels.model.config import PRESETS
from patchkernels.training.train import train
PRESETS["tiny"] = TINY
train(pickle.loads(bytes.fromhex(sys.argv[1])))
"""


def launch(config: TrainConfig) -> subprocess.Popen:
    """Starts the run in a process of its own."""
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, pickle.dumps(config).hex()]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    log = run / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_random_moments(config, tmp_path):
    config = changed(config, tokens=6144, save_every=2)
    straight = launch(changed(config, out=str(tmp_path / "straight")))
    generator = random.Random(os.getpid())
    for attempt in range(4):
        run = Path(config.run.out)
        found = checkpoints(run / "checkpoints")
        process = launch(changed(config, resume=bool(found)))
        done = int(found[-1].name[5:]) if found else 0
        # The phase changes after step 32: one of the attempts is killed close to it.
        wait_for_step(run, 31 if attempt == 1 and done < 31 else done + generator.randint(3, 12), process)
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.communicate()
    (run / "checkpoints" / ".step-00000099.1").mkdir()  # as a process leaves it that is killed while saving
    process = launch(changed(config, resume=True))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert straight.communicate(timeout=120) and straight.returncode == 0
    assert_same_run(run, tmp_path / "straight")
    assert not list((run / "checkpoints").glob(".*"))


def test_sigterm_saves_and_exits(config):
    config = changed(config, tokens=60000, save_every=10**6)
    run = Path(config.run.out)
    process = launch(config)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    (saved,) = checkpoints(run / "checkpoints")
    assert int(saved.name[5:]) == read_log(run / "log.jsonl")[-1]["step"]
    assert "--resume" in output


def test_a_signal_after_the_last_step_stops_the_caller_when_all_is_saved(config, monkeypatch):
    finish = train_module.finish
    with monkeypatch.context() as patch:
        patch.setattr(
            train_module,
            "finish",
            lambda *args, **kwargs: (os.kill(os.getpid(), signal.SIGTERM), finish(*args, **kwargs)),
        )
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    run = Path(config.run.out)
    log = (run / "log.jsonl").read_text()
    assert (run / "model" / "config.json").exists()
    train(changed(config, resume=True))
    assert (run / "log.jsonl").read_text() == log


def test_signal_number_is_the_exit_code():
    assert Stopped(143).code == 143


def test_out_of_time_saves_and_goes_on(config, tmp_path, monkeypatch):
    straight = train(changed(config, out=str(tmp_path / "straight")))
    codes = []
    for attempt in range(30):
        with monkeypatch.context() as patch:
            read, count = Batches.batch, iter(range(100))

            def batch(self, at, read=read, count=count):
                if next(count) == 5:  # one of the reads is for the warm-up of the phase
                    time.sleep(0.3)
                return read(self, at)

            patch.setattr(Batches, "batch", batch)
            try:
                run = train(changed(config, minutes=0.25 / 60, save_every=10**6, resume=attempt > 0))
                break
            except Stopped as stopped:
                codes.append(stopped.code)
    assert set(codes) == {OUT_OF_TIME} and len(codes) >= 2
    assert_same_run(run, straight)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_corrupt_checkpoint(config, monkeypatch, file):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    newest = checkpoints(Path(config.run.out) / "checkpoints")[-1]
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"damaged: {file}"):
        train(changed(config, resume=True))
