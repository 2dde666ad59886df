"""Options, the environment in the JSON, comparisons as benchmark cases, and what is missing."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

import patchkernels  # noqa: F401

# transformers imports whatever answers to "kernels"; with the package imported, the checkout may leave the path
CHECKOUT = Path(__file__).parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]

from bench.compare import Comparison, Group  # noqa: E402
from bench.replay import replay  # noqa: E402

DISTRIBUTIONS = ("patchkernels", "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy",
                 "quack-kernels", "megatron-core", "flash-attn")  # fmt: skip
MISSING: dict[str, str] = {}
SCALES = ("tiny", "small", "published")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=SCALES, help="shapes; default: published on a GPU, small on a CPU")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale(config: pytest.Config) -> str:
    return str(config.getoption("--scale") or ("published" if torch.cuda.is_available() else "small"))


@functools.cache
def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "device_type": "cuda" if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": get_commit_info().get("id"),
        "versions": found,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for private in ("node", "release"):  # whose machine it was is nobody's business
        machine_info.pop(private, None)
    machine_info |= environment() | {"scale": scale(config), "peak": _peak()}


def _peak() -> dict[str, float]:
    """What the device reached on a large product and a large copy: the roofs of the roofline."""
    from bench.compare import copy_of
    from bench.measure import interleaved

    on_gpu = torch.cuda.is_available()
    n, size = (8192, 2**31) if on_gpu else (2048, 2**28)
    a = torch.randn(n, n, device=device(), dtype=torch.bfloat16 if on_gpu else torch.float32)
    taken = interleaved({"product": lambda: a @ a, "copy": copy_of(size, device())}, device(), 1.0)
    best = {name: min(values) for name, values in taken.items()}
    return {"tflops_per_second": 2 * n**3 / best["product"] / 1e12, "gigabytes_per_second": size / best["copy"] / 1e9}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of a module: the contenders of each of its comparisons, one comparison after the other."""
    if "comparison" in metafunc.fixturenames:
        groups = metafunc.module.groups(scale(metafunc.config))
        cases = {f"{group.id}-{name}": (group, name) for group in groups for name in group.contenders}
        names = ("comparison", "contender")
        metafunc.parametrize(names, cases.values(), ids=cases, indirect=["comparison"])


_last: dict[Group, Comparison | Exception] = {}


@pytest.fixture
def comparison(request: pytest.FixtureRequest) -> Comparison:
    """The comparison of this case, measured when its first case runs; only the last one is kept."""
    group: Group = request.param
    if group not in _last:
        _last.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.compiler.reset()  # a shape of the last comparison is no reason to recompile in this one
        try:
            _last[group] = group.make().run()
        except Exception as error:
            _last[group] = error
    result = _last[group]
    if isinstance(result, Exception):
        raise result
    MISSING.update(result.missing)
    return result


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Comparison, str], None]:
    """Hands the rounds that a contender took in a comparison to pytest-benchmark."""

    def case(comparison: Comparison, name: str) -> None:
        if name in comparison.missing:
            pytest.skip(f"missing: {comparison.missing[name]}")
        seconds = comparison.seconds[name]
        benchmark.group = comparison.name
        benchmark.extra_info |= comparison.info(name)
        benchmark.extra_info["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        benchmark.extra_info["environment"] = environment()
        with replay.of(seconds) if benchmark.enabled else contextlib.nullcontext():
            benchmark.pedantic(lambda: None, rounds=len(seconds))

    return case


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        terminalreporter.section("peers that are missing from these results")
        for name, reason in sorted(MISSING.items()):
            terminalreporter.line(f"{name}: {reason}")
