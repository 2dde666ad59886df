"""bench/gpu_first_hour.sh and its parts, on a CPU, with stand-ins for what comes with a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import distributed
import pytest
import torch
from checkout import CHECKOUT
from source_tree import write_tree

SCRIPT = CHECKOUT / "bench" / "gpu_first_hour.sh"
STAND_INS = {
    "nvidia-smi": 'case "$*" in *query-gpu*) echo "0, Stand-in 100, driver 1.2.3, $HOME";; esac',
    "compute-sanitizer": """case $1 in
        --tool=racecheck) echo '========= Error: Race reported between Write and Read access'; exit 9;;
    esac""",
}
OPTIONS = {
    "TESTS_ARGS": "-k test_head_module_gives_logits_or_loss --ignore-glob *s/*/*.py",
    "OPERATORS_ARGS": "--device cpu --checks model",
    "TUNE_ARGS": "--device cpu --vocab 129 --rows 2 --tokens 16 --table 8 --hidden 32",
    "BENCHMARKS_ARGS": "--scale tiny -k 'bench_patch_embedding and patchkernels'",
    "TRAINING_ARGS": "--tokens 4096 --context 16 --batch-size 2 --data.vocab-size 300",
    "CORPUS_ARGS": "--megabytes 1",
}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        file = commands / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    variables = {
        "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "TOKEN": "a-secret-token",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | OPTIONS | variables


def run(folder: Path, environment: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), str(folder)]
    return subprocess.run(
        command, cwd=folder.parent, env=environment | variables, capture_output=True, text=True, timeout=300
    )


def statuses(folder: Path) -> dict[str, str]:
    rows = [line.split("|") for line in (folder / "summary.md").read_text().splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows[2:]}


def packed(folder: Path) -> dict[str, bytes]:
    with tarfile.open(f"{folder}.tar.gz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}


def test_every_part_runs_though_one_fails(tmp_path, environment):
    folder, tree = tmp_path / "out", write_tree(tmp_path / "tree")
    environment["CORPUS_ARGS"] += f" --path {tree}"
    environment["TRAINING_ARGS"] += f" --data.path {tree}"
    names = "facts tests operators sanitizer tune benchmarks training several_gpus corpus"
    done = run(folder, environment, PARTS=names)
    assert done.returncode == 1, done.stdout + done.stderr
    expected = dict.fromkeys(names.split(), "passed") | {"sanitizer": "failed", "several_gpus": "skipped"}
    assert statuses(folder) == expected, done.stdout
    last = done.stdout.splitlines()[-len(expected) - 1 :]
    assert last[-1] == f"To send back: {folder}.tar.gz"
    assert [line.split()[:2] for line in last[:-1]] == [[status, name] for name, status in expected.items()]
    failed = next(line for line in last if line.startswith("failed"))
    assert "exit status 9; ========= Error: Race reported" in failed and failed.endswith(f"{folder}/sanitizer.log")
    assert "it needs two GPUs, torch sees 0" in done.stdout

    files = packed(folder)
    assert {f"out/{name}.log" for name in expected if name != "several_gpus"} <= files.keys()
    assert {"out/summary.md", "out/benchmarks.json", "out/training/plot.png"} <= files.keys()
    assert not [name for name in files if "checkpoint" in name or "model" in name or name.endswith(".parquet")]
    facts = files["out/facts.log"].decode()
    assert "Stand-in 100, driver 1.2.3, ~" in facts and f"torch=={torch.__version__}" in facts
    for content in files.values():
        assert b"a-secret-token" not in content and environment["HOME"].encode() not in content
    assert "1 of 1 tests did not use the GPU" in files["out/tests.log"].decode()
    sanitized = [line for line in files["out/sanitizer.log"].decode().splitlines() if line.startswith("$ ")]
    assert len(sanitized) == 4
    assert all(line.endswith(f"{sys.executable} -m bench.operators_on_gpu --checks results") for line in sanitized)

    again = run(folder, environment, MINUTES="0")
    assert again.stdout.splitlines()[0].endswith("for: sanitizer report several_gpus experiment"), again.stdout
    kept = dict.fromkeys(expected, "passed") | dict.fromkeys(
        ("sanitizer", "report", "several_gpus", "experiment"), "skipped"
    )
    assert statuses(folder) == kept and "the 0 minutes are over" in again.stdout and again.returncode == 0


def test_time_limits(tmp_path, environment):
    """The experiment that finds its time over can be continued; a command beyond its limit is stopped."""
    folder = tmp_path / "out"
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\necho waits; sleep 60\n")
    start = time.monotonic()
    done = run(folder, environment, PARTS="facts experiment", MINUTES="0.9", CORPUS="none.parquet")
    assert time.monotonic() - start < 30
    assert statuses(folder) == {"facts": "failed", "experiment": "unfinished"}, done.stdout
    (folder / "facts").mkdir()
    (folder / "experiment").mkdir(exist_ok=True)
    run(folder, environment, PARTS="facts experiment", MINUTES="0.1", CORPUS="none.parquet")
    assert not (folder / "facts").exists() and (folder / "experiment").exists()
    assert "stopped after 2 s, its limit" in done.stdout and "waits" in (folder / "facts.log").read_text()
    assert done.returncode == 1


def test_an_interrupt_packs_what_is_there(tmp_path, environment):
    folder = tmp_path / "out"
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\necho waits; sleep 60\n")
    environment["PARTS"] = "facts tune"
    with subprocess.Popen(
        ["bash", str(SCRIPT), str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    ) as script:
        log = folder / "facts.log"
        deadline = time.monotonic() + 60
        while not (log.is_file() and "waits" in log.read_text()):
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.05)
        script.send_signal(signal.SIGINT)
        printed, _ = script.communicate(timeout=60)
    assert script.returncode == 130, printed
    assert statuses(folder) == {"facts": "interrupted"}
    assert "waits" in packed(folder)["out/facts.log"].decode()
    assert printed.splitlines()[-1] == f"To send back: {folder}.tar.gz"


def test_wrong_arguments(tmp_path, environment):
    done = run(tmp_path / "out", environment, PARTS="facts tea")
    assert done.returncode == 1 and "got tea" in done.stderr
    done = run(tmp_path / "out", environment, PYTHON="/bin/false")
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()
    precious = tmp_path / "out/training/file"
    precious.parent.mkdir(parents=True)
    precious.touch()
    done = run(tmp_path / "out", environment, PARTS="training")
    assert done.returncode == 1 and f"{tmp_path}/out holds other files" in done.stderr
    assert precious.is_file()


@pytest.fixture
def one_case(monkeypatch):
    """The checks of operators, with one case."""
    from bench import operators_on_gpu

    all_cases = operators_on_gpu.cases
    monkeypatch.setattr(operators_on_gpu, "cases", lambda *arguments: all_cases(*arguments)[:1])
    return operators_on_gpu


def test_a_wrong_operator_is_found(one_case, monkeypatch, capsys):
    arguments = ["--device", "cpu", "--checks", "results"]
    assert one_case.main(arguments) == 0
    original = one_case.patch_embedding
    monkeypatch.setattr(one_case, "patch_embedding", lambda *a, **o: 1.05 * original(*a, **o))
    assert one_case.main(arguments) == 1
    assert capsys.readouterr().out.endswith("failed: results\n")


@pytest.mark.parametrize("replays", [True, False])
def test_graphs_are_replayed(one_case, monkeypatch, replays):
    """With a stand-in for CUDA graphs, of which one kind does nothing when it is replayed."""
    computed, original = [], one_case.value_and_gradients

    def recorded(*arguments):
        computed.append((arguments, original(*arguments)))
        return computed[-1][1]

    class Graph:
        def replay(self):
            arguments, results = computed[-1]
            if replays:
                for result, value in zip(results, original(*arguments)):
                    result.copy_(value)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(one_case, "value_and_gradients", recorded)
    for name, stand_in in {
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with contextlib.nullcontext() if replays else pytest.raises(AssertionError, match="other values"):
        one_case.check_graphs(torch.device("cpu"))


def test_synchronisation_is_forbidden_while_an_operator_runs(one_case, monkeypatch):
    modes, original = ["default"], one_case.value_and_gradients
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    seen = []
    monkeypatch.setattr(
        one_case, "value_and_gradients", lambda *arguments: seen.append(modes[-1]) or original(*arguments)
    )
    one_case.check_synchronisation(torch.device("cpu"))
    assert seen == ["default", "error"] and modes[-1] == "default"


def visible_gpus() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"] + os.environ["TRITON_INTERPRET"]


def test_processes_that_share_a_test_run_on_the_cpu():
    """gloo and the interpreter are for tensors of the CPU, and a GPU that is there would be taken for the mesh."""
    assert distributed.run(visible_gpus, 1) == ["1"]


def test_tests_that_allocate_nothing_on_the_gpu_are_listed(monkeypatch):
    from bench import gpu_use

    count = [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: {"allocation.all.allocated": count[0] * index})
    for name, allocates in (("on the GPU", True), ("elsewhere", False)):
        item = type("Item", (), {"nodeid": name})
        protocol = gpu_use.pytest_runtest_protocol(item)
        next(protocol)
        count[0] += allocates
        assert next(protocol, None) is None
    assert gpu_use.allocated == {"on the GPU": True, "elsewhere": False}


def test_parts_are_kept_only_for_the_same_commit(tmp_path):
    from bench.gpu_first_hour import Hour, Outcome

    hour = Hour(tmp_path, 1.0)
    hour.outcomes["facts"] = Outcome("passed", 1.0)
    hour.save()
    assert Hour(tmp_path, 1.0).outcomes == hour.outcomes
    state = json.loads((tmp_path / "parts.json").read_text())
    (tmp_path / "parts.json").write_text(json.dumps(state | {"commit": "another"}))
    assert Hour(tmp_path, 1.0).outcomes == {}
