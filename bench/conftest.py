"""How pytest runs the benchmarks: the option --scale, one case per contender, and the environment in the JSON."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
import torch
from checkout import leave_checkout
from pytest_benchmark.utils import get_commit_info

from bench.compare import Comparison, Group, copy_of
from bench.measure import interleaved
from bench.replay import replay
from patchkernels.experiment.provenance import processor

leave_checkout()  # before any peer imports transformers

DISTRIBUTIONS = ("patchkernels", "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy",
                 "quack-kernels", "megatron-core", "flash-attn")  # fmt: skip
SCALES = ("tiny", "small", "published")

missing_contenders: dict[str, str] = {}  # name to reason, gathered for the summary


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=SCALES, help="set of shapes; default: published on a GPU, small on a CPU")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtypes() -> tuple[torch.dtype, ...]:
    """Those in which the operators are measured."""
    return (torch.bfloat16,) if device().type == "cuda" else (torch.float32, torch.bfloat16)


def scale(config: pytest.Config) -> str:
    return str(config.getoption("--scale") or ("published" if torch.cuda.is_available() else "small"))


@functools.cache
def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "device_type": "cuda" if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": get_commit_info().get("id"),
        "versions": versions,
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for private in ("node", "release"):  # the names of the machine and of its kernel: not for publication
        machine_info.pop(private, None)
    machine_info |= environment() | {"scale": scale(config), "peak": _peak()}


def _peak() -> dict[str, float]:
    """The rates that the device reaches on a large matrix product and a large copy: the roofs of the roofline plot."""
    on_gpu = torch.cuda.is_available()
    n, size = (8192, 2**31) if on_gpu else (2048, 2**28)
    a = torch.randn(n, n, device=device(), dtype=torch.bfloat16 if on_gpu else torch.float32)
    seconds = interleaved({"product": lambda: a @ a, "copy": copy_of(size, device())}, device(), 1.0)
    best = {name: min(rounds) for name, rounds in seconds.items()}
    return {"tflops_per_second": 2 * n**3 / best["product"] / 1e12, "gigabytes_per_second": size / best["copy"] / 1e9}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes each contender of a module's comparisons a case, one comparison after the other."""
    if "comparison" in metafunc.fixturenames:
        groups = metafunc.module.groups(scale(metafunc.config))
        cases = {f"{group.id}-{name}": (group, name) for group in groups for name in group.contenders}
        names = ("comparison", "contender")
        metafunc.parametrize(names, cases.values(), ids=cases, indirect=["comparison"])


_last: dict[Group, Comparison | Exception] = {}


@pytest.fixture
def comparison(request: pytest.FixtureRequest) -> Comparison:
    """The comparison that a case belongs to.

    All contenders are measured when the first of their cases runs. Only the last comparison is kept, so that two never
    hold memory at once. A comparison that failed raises its error in each of its cases.
    """
    group: Group = request.param
    if group not in _last:
        _last.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # Otherwise the compiler counts earlier comparisons' shapes as recompilations, of which it allows only a few.
        torch.compiler.reset()
        try:
            _last[group] = group.make().run()
        except Exception as error:
            _last[group] = error
    result = _last[group]
    if isinstance(result, Exception):
        raise result
    missing_contenders.update(result.missing)
    return result


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Comparison, str], None]:
    """A function that reports the measured rounds of a contender to pytest-benchmark."""

    def record_case(comparison: Comparison, name: str) -> None:
        if name in comparison.missing:
            pytest.skip(f"missing: {comparison.missing[name]}")
        seconds = comparison.seconds[name]
        benchmark.group = comparison.name
        benchmark.extra_info |= comparison.info(name)
        benchmark.extra_info["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        benchmark.extra_info["environment"] = environment()
        with replay.rounds(seconds) if benchmark.enabled else contextlib.nullcontext():
            benchmark.pedantic(lambda: None, rounds=len(seconds))

    return record_case


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if missing_contenders:
        terminalreporter.section("peers that are missing from these results")
        for name, reason in sorted(missing_contenders.items()):
            terminalreporter.line(f"{name}: {reason}")
