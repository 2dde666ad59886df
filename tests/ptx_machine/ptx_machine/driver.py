"""A Triton driver for a GPU that is not there: ``kernel[grid](tensors of the CPU)`` is compiled and executed as PTX."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from .counters import Counters
from .machine import Options, prepare, run
from .resources import Resources, registers_and_spills

SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}  # bytes of a CTA; 227 KB elsewhere


@dataclass
class Launch:
    """What is known of one launch."""

    name: str
    grid: tuple[int, int, int]
    signature: dict[str, str]  # the type of each argument; "constexpr" also where a value of 1 was compiled in
    ptx: str
    resources: Resources
    counters: Counters = field(default_factory=Counters)


@dataclass
class Tally:
    """What was compiled and executed for one architecture in this process."""

    launches: int = 0
    executed: set[str] = field(default_factory=set)  # hashes of kernels
    compiled: set[str] = field(default_factory=set)
    forms: set[str] = field(default_factory=set)  # instructions with their modifiers, of all that was compiled

    def add(self, other: Tally) -> None:
        self.launches += other.launches
        for name in ("executed", "compiled", "forms"):
            getattr(self, name).update(getattr(other, name))


TALLIES: dict[int, Tally] = defaultdict(Tally)  # by compute capability


@dataclass(frozen=True)
class _Function:
    """What Triton holds as a loaded kernel."""

    registers: int
    spilled: int
    spills_in_loop: bool


class _Utilities:
    """The part of a driver that asks about the device and loads binaries."""

    def __init__(self, driver: MachineDriver):
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = SHARED_LIMITS.get(self.driver.target.arch, 227 * 1024)
        return {
            "max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
            "sm_clock_rate": 1_755_000, "mem_clock_rate": 2_619_000, "mem_bus_width": 5120,
        }  # fmt: skip

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        function = _Function(*registers_and_spills(cubin))
        return self, function, function.registers, function.spilled, 1024  # the module: anything but None


class Launcher:
    """Runs a compiled kernel; Triton makes one for each."""

    def __init__(self, source: Any, metadata: Any):
        for option in ("launch_cooperative_grid", "global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, option, 0):
                raise NotImplementedError(f"{metadata.name}: {option} is not supported by the machine")
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError(f"{metadata.name}: clusters of CTAs are not supported by the machine")
        self.source, self.metadata = source, metadata
        cache = get_cache_manager(metadata.hash)
        with open(cache.get_file(f"{source.name[:150]}.ptx")) as file:  # as triton.compile names it
            self.ptx = file.read()
        program = prepare(self.ptx).program  # raises for an instruction that the machine does not know
        self.tally = TALLIES[triton.runtime.driver.active.target.arch]
        self.tally.compiled.add(metadata.hash)
        self.tally.forms.update(".".join((i.op, *i.modifiers)) for b in program.blocks for i in b.body)

    def __call__(self, x: int, y: int, z: int, stream: int, function: _Function, kernel_metadata: Any,
                 launch_metadata: Any, enter: Any, leave: Any, *values: Any) -> None:  # fmt: skip
        driver = triton.runtime.driver.active
        arguments = list(_flatten(self.source.signature, values))
        counters = None
        if driver.recording is not None:
            launch = self.describe((x, y, z), function)
            counters = launch.counters
            driver.recording.append(launch)
        if enter:
            enter(launch_metadata)
        if x * y * z:
            self.tally.launches += 1
            self.tally.executed.add(self.metadata.hash)
            run(self.ptx, (x, y, z), arguments, self.metadata.shared, driver.options, counters)
        if leave:
            leave(launch_metadata)

    def describe(self, grid: tuple[int, int, int], function: _Function) -> Launch:
        """What is known before the kernel runs."""
        threads = 32 * self.metadata.num_warps
        shared = self.metadata.shared
        resources = Resources(function.registers, function.spilled, function.spills_in_loop, shared, threads)
        return Launch(self.metadata.name, grid, dict(self.source.signature), self.ptx, resources)


def _flatten(signature: dict[str, Any], values: tuple) -> Iterator[tuple[str, Any]]:
    """Names and values of the arguments that the compiled kernel takes; tuples in parts."""
    for (name, kind), value in zip(signature.items(), values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten({f"{name}.{n}": k for n, k in enumerate(kind)}, tuple(value))
        elif kind.startswith("tensordesc"):
            raise NotImplementedError(f"{name}: tensor descriptors are not supported by the machine")
        elif kind != "constexpr":
            yield name, value


class MachineDriver:
    """Triton's driver interface, for a GPU of compute capability ``arch`` / 10."""

    def __init__(self, arch: int, options: Options):
        self.target, self.options = GPUTarget("cuda", arch, 32), options
        self.recording: list[Launch] | None = None
        self.utils, self.launcher_cls = _Utilities(self), Launcher

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Launch]]:
        """Collects the launches within, with their counters."""
        outer, self.recording = self.recording, []
        try:
            yield self.recording
        finally:
            self.recording = outer


def install(arch: int = 90, **options: Any) -> MachineDriver:
    """Makes Triton compile for this architecture and run on the machine, until another driver is set.

    Call it before the kernels are defined, and not under ``TRITON_INTERPRET``.

    Args:
        arch: 80, 90, 100.
        options: the fields of :class:`~ptx_machine.machine.Options`.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted and never compiled")
    driver = MachineDriver(arch, Options(**options))
    triton.runtime.driver.set_active(driver)
    return driver
