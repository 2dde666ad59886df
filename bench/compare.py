"""One comparison: contenders that compute the same thing are checked, then timed in turn.

Each contender is a case of the benchmark, with its own entry in the JSON.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import OURS
from bench.measure import Function, bytes_of, interleaved, peak_extra_bytes, relative_errors
from bench.peers import Missing

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the relative error against fp32
Contender = Callable[[], "list[Tensor]"]


class Group(NamedTuple):
    """A comparison that is made when its first case runs, and the contenders that are its cases."""

    id: str
    contenders: tuple[str, ...]
    make: Callable[[], Comparison]


@dataclass
class Comparison:
    """Contenders of one operator at one shape, and what was measured of them.

    A contender is a function that returns its results, or a :class:`Missing` that says why it cannot run. Floors are
    functions without results: they do the work that the hardware cannot avoid, and are timed in the same rounds.
    """

    operator: str
    case: str  # "forward", "forward + backward", ...
    shape: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    contenders: dict[str, Contender | Missing]
    exact: Contender | None = None  # the eager definition in fp32; None where results are not comparable
    floor: str | None = None  # the name of the floor that ``share_of_floor`` refers to
    floors: dict[str, Function] = field(default_factory=dict)
    flops: int | None = None  # the smallest number that the case needs
    bytes: int | None = None  # the smallest number that the case moves
    budget_seconds: float = 2.0  # about how long all rounds may take together
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # further JSON values by contender

    # What run() measures, by contender.
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    result_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.operator}, {self.case}, {shape}, {_name_of(self.dtype)}"

    @property
    def missing(self) -> dict[str, str]:
        """The contenders that cannot run, with the reason."""
        return {name: c.reason for name, c in self.contenders.items() if isinstance(c, Missing)}

    def run(self) -> Comparison:
        """Checks every contender, then times them in turn. One whose result is wrong counts as missing.

        ``AssertionError`` if it is one of ours.
        """
        exact = self.exact() if self.exact is not None else []
        for name, contender in self.contenders.items():
            if isinstance(contender, Missing):
                continue
            results = contender()
            self.result_bytes[name] = bytes_of(results)
            if self.exact is not None:
                self.errors[name] = relative_errors(results, exact)
                if not max(self.errors[name]) <= TOLERANCE[self.dtype]:
                    reason = f"wrong in {self.name}: relative errors {', '.join(f'{e:.2g}' for e in self.errors[name])}"
                    if name.startswith(OURS):
                        raise AssertionError(f"{name} is {reason}")
                    self.contenders[name] = Missing(reason)
            del results
        del exact
        running: dict[str, Any] = {n: c for n, c in self.contenders.items() if not isinstance(c, Missing)}
        for name, contender in running.items():
            self.peak_bytes[name] = peak_extra_bytes(contender, self.device)
        self.seconds = interleaved({**running, **self.floors}, self.device, self.budget_seconds)
        return self

    def ratio(self, name: str, other: str) -> float:
        """The time of ``name`` over that of ``other``: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other]))

    def info(self, name: str) -> dict[str, Any]:
        """The JSON values of a contender besides its times."""
        median = statistics.median(self.seconds[name])
        quartiles = statistics.quantiles(self.seconds[name], n=4)
        values = {
            "operator": self.operator,
            "case": self.case,
            "contender": name,
            "shape": self.shape,
            "dtype": _name_of(self.dtype),
            "median_seconds": median,
            "spread": (quartiles[2] - quartiles[0]) / median,  # interquartile range over median
            "ratio_to": {other: self.ratio(name, other) for other in self.seconds if other != name},
            "missing": self.missing,
        } | self.extra.get(name, {})
        if name in self.peak_bytes:
            values |= {"peak_extra_bytes": self.peak_bytes[name], "result_bytes": self.result_bytes[name]}
        if name in self.errors:
            values["relative_errors"] = self.errors[name]
        if self.flops is not None:
            values |= {"flops": self.flops, "tflops_per_second": self.flops / median / 1e12}
        if self.bytes is not None:
            values |= {"bytes": self.bytes, "gigabytes_per_second": self.bytes / median / 1e9}
        if self.floor is not None:
            values |= {"floor": self.floor, "share_of_floor": self.ratio(self.floor, name)}
        return values


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """The function's result and the gradients of its arguments."""
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@functools.cache
def copy_of(size: int, device: torch.device) -> Function:
    """A function that moves ``size`` bytes: it reads half of them and writes the other half."""
    source = torch.empty(max(size // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
