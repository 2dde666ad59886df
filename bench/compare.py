"""One comparison: contenders that compute the same thing, checked, timed in turn, each a case of the benchmark."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import Function, bytes_of, interleaved, peak_extra_bytes, relative_errors
from bench.peers import Missing

OURS = "patchkernels"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative errors against fp32
Contender = Callable[[], "list[Tensor]"]


class Group(NamedTuple):
    """A comparison that is yet to be made, and the contenders whose cases it gives."""

    id: str
    contenders: tuple[str, ...]
    make: Callable[[], Comparison]


@dataclass
class Comparison:
    """Contenders of one operator at one shape, and what was measured of them.

    A contender is a function that computes the results, or a :class:`Missing` with the reason why it cannot run.
    Floors compute no results: they are the hardware's limit, timed in the same rounds.
    """

    operator: str
    case: str  # "forward", "forward + backward", ...
    shape: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    contenders: dict[str, Contender | Missing]
    exact: Contender | None = None  # the eager definition in fp32, or None where nothing can be compared
    floor: str | None = None
    floors: dict[str, Function] = field(default_factory=dict)
    flops: int | None = None  # the fewest that the case needs
    bytes: int | None = None  # the fewest that the case moves
    budget_seconds: float = 2.0
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # what else a contender's JSON says
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    result_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.operator}, {self.case}, {shape}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def missing(self) -> dict[str, str]:
        return {name: c.reason for name, c in self.contenders.items() if isinstance(c, Missing)}

    def run(self) -> Comparison:
        """Checks every contender, then times them in turn. A wrong result is an error of the benchmark."""
        running: dict[str, Any] = {n: c for n, c in self.contenders.items() if not isinstance(c, Missing)}
        exact = self.exact() if self.exact is not None else []
        for name, contender in running.items():
            results = contender()
            self.result_bytes[name] = bytes_of(results)
            if self.exact is not None:
                self.errors[name] = relative_errors(results, exact)
                if not max(self.errors[name]) <= TOLERANCE[self.dtype]:
                    raise AssertionError(f"{name} is wrong in {self.name}: relative errors {self.errors[name]}")
            del results
        del exact
        for name, contender in running.items():
            self.peak_bytes[name] = peak_extra_bytes(contender, self.device)
        self.seconds = interleaved({**running, **self.floors}, self.device, self.budget_seconds)
        return self

    def ratio(self, name: str, other: str) -> float:
        """Time of ``name`` over that of ``other``: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other]))

    def info(self, name: str) -> dict[str, Any]:
        """What a case's JSON says beside its times."""
        median = statistics.median(self.seconds[name])
        quartiles = statistics.quantiles(self.seconds[name], n=4)
        values = {
            "operator": self.operator,
            "case": self.case,
            "contender": name,
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
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


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """The result and its gradients."""
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@functools.cache
def copy_of(size: int, device: torch.device) -> Function:
    """A function that moves ``size`` bytes: reads half of them and writes half."""
    source = torch.empty(max(size // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
