"""The benchmarks at shapes too small to mean anything: every case runs, is recorded in full, and is drawn."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkout import CHECKOUT
from oracle import DEVICE

pytest.importorskip("pytest_benchmark")
VARIABLES = {"PYTHONPATH": str(CHECKOUT), "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0"}
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | VARIABLES


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "tiny.json"
    options = ("--benchmark-only", "--scale", "tiny", "--benchmark-json", file, "-p", "no:cacheprovider")
    done = run("pytest", "bench", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("Liger", "CCE", "QuACK", "Megatron"):
        assert f"\n{name}: " in done.stdout, "a missing peer is listed"
    return file


@pytest.fixture(scope="module")
def cases(result) -> dict[tuple[str, str, str], dict]:
    benchmarks = json.loads(result.read_text())["benchmarks"]
    key = "{operator}|{case}, {dtype}|{contender}".format_map
    found = {tuple(key(b["extra_info"]).split("|")): b for b in benchmarks}
    assert len(found) == len(benchmarks)
    return found


def test_every_case_records_device_times_and_comparisons(cases):
    ours = [key for key in cases if key[2] in ("patchkernels", "PatchLM, K=4")]
    assert {operator for operator, _, _ in ours} == {
        "patch_embedding", "patch_cross_entropy", "linear_patch_cross_entropy", "training step", "training loop"
    }  # fmt: skip
    for (operator, case, name), benchmark in cases.items():
        info = benchmark["extra_info"]
        assert {"torch", "triton", "patchkernels"} <= set(info["environment"]["versions"])
        assert info["environment"]["device"] and len(info["environment"]["commit"]) == 40
        assert info["median_seconds"] == pytest.approx(benchmark["stats"]["median"])
        assert benchmark["stats"]["rounds"] >= 4
        assert info["spread"] >= 0
        others = {n for o, c, n in cases if (o, c) == (operator, case)} - {name}
        assert set(info["ratio_to"]) == others
    for key in ours:
        info = cases[key]["extra_info"]
        assert info["peak_extra_bytes"] > 0
        rate = info.get("tflops_per_second", 0) + info.get("gigabytes_per_second", 0)
        assert rate > 0 or key[0] == "training loop"
        if "training" not in key[0]:
            assert info["share_of_floor"] > 0
            assert max(info["relative_errors"]) < (1e-4 if info["dtype"] == "float32" else 2e-2)


def test_the_report_shows_every_contender_and_draws_every_figure(result, cases):
    done = run("bench.report", result)
    assert done.returncode == 0, done.stderr
    for _, _, name in cases:
        assert f"| {name} |" in done.stdout or "K=" in name
    assert "Cost of a run" in done.stdout
    drawn = {path.name for path in result.parent.glob("*.png")}
    assert drawn == {f"tiny-{n}.png" for n in ("embedding", "cross-entropy", "linear", "roofline", "parts", "cost")}
    assert all(path.stat().st_size > 5000 for path in result.parent.glob("*.png"))


def test_the_results_page_shows_the_newest_result():
    newest = max((CHECKOUT / "bench/results").glob("*/*.json"), key=lambda path: path.stem)
    script = f"from pathlib import Path; from bench.report import report; print(report(Path({str(newest)!r})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True)
    lines = set(done.stdout.splitlines())
    page = CHECKOUT / "docs" / "results.md"
    text = page.read_text()
    shown = text[text.index("## Benchmarks") :].splitlines()
    assert [line for line in shown if line.startswith("|") and line not in lines] == []
    assert any(line.startswith("| demo | 4 | ") for line in shown)
    assert done.stdout.splitlines()[0] in shown
    figures = re.findall(r"\]\((\.\./bench/[^)]*png)\)", text)
    assert figures and all((page.parent / path).is_file() for path in figures)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    done = run("bench.report", tmp_path / "x.json")
    assert done.returncode == 1
    assert "x.json is no result of" in done.stderr
    assert run("bench.report", tmp_path / "nothing.json").returncode == 1


def test_a_wrong_result_is_an_error_if_it_is_ours_and_else_not_timed():
    import torch

    from bench.compare import Comparison

    right, wrong = (lambda: [torch.ones(3)]), (lambda: [torch.ones(3) * 1.01])
    settings = {"operator": "o", "case": "c", "shape": {}, "dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(AssertionError, match=r"patchkernels, compiled is wrong in o, c, , float32: .* 0\.01"):
        Comparison(**settings, contenders={"right": right, "patchkernels, compiled": wrong}, exact=right).run()
    found = Comparison(**settings, contenders={"right": right, "peer": wrong}, exact=right, budget_seconds=0.0).run()
    assert found.missing == {"peer": "wrong in o, c, , float32: relative errors 0.01"}
    assert "right" in found.seconds and "peer" not in found.seconds


def test_peak_memory_is_what_the_docstring_says():
    """``memory="low"`` needs at most 1 % of the bytes of 16-bit logits, besides the gradients.

    The shape is such that the statistics of the rows do not count.
    """
    from functools import partial

    from bench.compare import gradients
    from bench.measure import bytes_of, peak_extra_bytes
    from patchkernels import linear_patch_cross_entropy
    from patchkernels.ops.linear_buffers import LOGITS_BYTES

    n, d, v = 512, 32, 128000
    leaves = [torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)]
    target = torch.randint(0, v, (n, 4))
    extra = {}
    for memory in ("default", "low"):
        loss = partial(linear_patch_cross_entropy, memory=memory)
        call = lambda loss=loss: gradients(lambda x, w: loss(x, w, target), leaves)  # noqa: E731
        extra[memory] = peak_extra_bytes(call, torch.device("cpu")) - bytes_of(call())
    assert extra["low"] <= 0.01 * n * v * 2
    in_chunks = LOGITS_BYTES["cpu"] + 4 * v * d  # the head's gradient is summed in fp32
    assert 4 * n * v > LOGITS_BYTES["cpu"] and extra["default"] <= 1.05 * in_chunks
    assert extra["default"] > 10 * extra["low"]


def test_a_gpu_waits_until_the_host_has_queued_a_call(monkeypatch):
    """With stand-ins for the GPU: the longer a call takes the host, the longer is its head start in the next round."""
    from bench import measure

    slept = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(measure, "L2_BYTES", 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    functions = {"long": lambda: time.sleep(0.02), "short": lambda: None}
    times = measure.interleaved(functions, torch.device("cuda"), seconds=0.0)
    assert times == {name: [1e-3] * measure.MIN_ROUNDS for name in functions}
    first, later = slept[:2], slept[2:]
    assert first == [2e5, 2e5] and len(later) == 2 * measure.MIN_ROUNDS
    assert min(later[::2]) > 2e9 * 0.02 and max(later[1::2]) < min(later[::2])


def test_the_search_for_launch_configurations_runs_and_leaves_the_defaults(monkeypatch, capsys):
    from bench import tune
    from patchkernels.kernels import cross_entropy

    default = cross_entropy.launch_config
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    sizes = {"rows": 2, "vocab": 300, "tokens": 16, "table": 8, "hidden": 64, "device": DEVICE}
    tune.main([str(part) for name, value in sizes.items() for part in (f"--{name}", value)])
    printed = capsys.readouterr().out
    assert printed.count(" default\n") == 3
    assert "BLOCK_V=128, num_warps=1" in printed and "BLOCK_D=128, num_warps=1" in printed
    assert cross_entropy.launch_config is default
    if DEVICE == "cpu":
        with pytest.raises(SystemExit):
            tune.main([])
        assert "torch sees none" in capsys.readouterr().err
