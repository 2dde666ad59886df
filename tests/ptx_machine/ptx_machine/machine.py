"""Runs a kernel: which threads go next, where they wait for each other, and the checks of a launch.

All CTAs of a batch advance together. Among the threads that may go on, those at the earliest basic block do, so that
threads which parted at a branch meet again behind it. ``order`` restricts who may go on:

    interleaved   every warp
    forward       in each CTA the first warp that can, as far as the next barrier
    backward      in each CTA the last warp that can; the CTAs too in falling order
    random        a different choice of warps before each access to memory, from ``seed``

A kernel without races gives the same bits in every order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from . import warps
from .batch import Batch
from .counters import Counters
from .faults import Fault
from .memory import GlobalMemory, Region
from .operations import DTYPES, size_of
from .parse import Program, parse
from .poison import accesses_by_parameter, fill_outputs
from .races import Record
from .translate import Code, compile_program

ORDERS = ("interleaved", "forward", "backward", "random")
LANES = 8192  # threads of a batch
STEPS = 1_000_000  # basic blocks that a batch may execute before its loops are taken to be endless
RUNNING, AT_BARRIER, AT_WARP_BARRIER, GONE = range(4)
NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """How kernels are run and what is checked."""

    order: str = "interleaved"
    seed: int = 0
    races: bool = True
    races_between_ctas: bool = True  # False for kernels whose CTAs synchronise by atomic accesses
    poison: bool = False  # fills outputs with NaN before a launch
    kept: frozenset[str] = frozenset()  # with poison: names of outputs that a kernel writes in part, on purpose

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")


@dataclass(frozen=True)
class Executable:
    """A program ready to run."""

    program: Program
    code: list[Code]
    constants: Region | None  # arrays of global memory that the module holds
    stored: frozenset[str]  # the parameters through which it stores
    read: frozenset[str]  # those through which it reads or changes memory


@functools.lru_cache(maxsize=4096)
def prepare(ptx: str, one_access_a_block: bool = False) -> Executable:
    program = parse(ptx, one_access_a_block)
    constants, size = None, max(program.size_of("global"), program.size_of("const"))
    if size:
        words = np.zeros(-(-size // 16) * 2, np.uint64)
        data = words.view(np.uint8)
        for array in program.arrays.values():
            data[array.offset : array.offset + len(array.data)] = np.frombuffer(array.data, np.uint8)
        constants = Region("the module's constants", words.ctypes.data, data, 1, tracked=False)
    return Executable(program, compile_program(program), constants, *accesses_by_parameter(program))


def run(ptx: str, grid: tuple[int, int, int], arguments: list[tuple[str, object]], shared_bytes: int, options: Options,
        counters: Counters | None = None) -> None:  # fmt: skip
    """Executes a launch on the tensors among ``arguments``.

    Args:
        ptx: a module with one kernel.
        arguments: names and values, in the order of the kernel's parameters; missing ones at the end are null.
        shared_bytes: of dynamic shared memory.
        counters: filled, if given.

    Raises:
        Fault: the kernel did something wrong. Memory holds what was stored up to there.
        NotImplementedError: an instruction that the machine does not know.
    """
    executable = prepare(ptx, options.order == "random")
    launch = _Launch(executable, grid, arguments, shared_bytes, options, counters)
    if options.poison:
        parameters = [name for name, _ in executable.program.parameters]
        tensors = {p: (name, value) for p, (name, value) in zip(parameters, arguments) if hasattr(value, "data_ptr")}
        fill_outputs(executable.stored, executable.read, tensors, options.kept)
    launch.run()


def _parameters(program: Program, arguments: list[tuple[str, object]]) -> dict[str, bytes]:
    """The bytes of each parameter."""
    values = [value for _, value in arguments]
    values += [None] * (len(program.parameters) - len(values))
    if len(values) != len(program.parameters):
        raise ValueError(f"{program.name} takes {len(program.parameters)} arguments, got {len(values)}")
    packed = {}
    for (name, kind), value in zip(program.parameters, values, strict=True):
        value = value.data_ptr() if hasattr(value, "data_ptr") else value or 0
        if kind.startswith("f"):
            packed[name] = np.array([value], DTYPES[kind]).tobytes()
        else:
            packed[name] = (int(value) % 256 ** size_of(kind)).to_bytes(size_of(kind), "little")
    return packed


class _Launch:
    def __init__(self, executable: Executable, grid: tuple[int, int, int], arguments: list[tuple[str, object]],
                 shared_bytes: int, options: Options, counters: Counters | None):  # fmt: skip
        self.executable, self.program, self.code = executable, executable.program, executable.code
        self.grid, self.options, self.counters = grid, options, counters
        self.shared_bytes = shared_bytes + self.program.size_of("shared")
        self.tensors = [(name, value) for name, value in arguments if hasattr(value, "data_ptr")]
        self.parameters = _parameters(self.program, arguments)
        self.memory = GlobalMemory(self.tensors, executable.constants)
        self.records = {id(region): Record(region) for region in self.memory.regions if region.tracked}
        self.random = np.random.default_rng(options.seed)

    def run(self) -> None:
        total = int(np.prod(self.grid))
        each = max(1, LANES // self.program.threads)
        batches = [np.arange(first, min(total, first + each)) for first in range(0, total, each)]
        if self.options.order == "backward":
            batches = [ctas[::-1] for ctas in batches[::-1]]
        with np.errstate(all="ignore"):
            for ctas in batches:
                self._run_batch(ctas)
        if self.counters is not None:
            for region in self.memory.regions:
                if region.tracked:
                    tensors = [t for _, t in self.tensors if t.untyped_storage().data_ptr() == region.base]
                    self.counters.add_bytes(self.records[id(region)], tensors)

    def _run_batch(self, ctas: np.ndarray) -> None:
        batch = Batch(self.program, self.grid, ctas, self.memory, self.shared_bytes, self.parameters,
                      self.executable.constants)  # fmt: skip
        scheduler = _Scheduler(batch, self.code, self.options, self.random)
        try:
            scheduler.run()
        except Fault as fault:
            self._check_races(batch, fault)  # a race explains what went wrong after it
            raise
        if self.counters is not None:
            self._count(batch, scheduler.executed)
        self._check_races(batch)

    def _count(self, batch: Batch, executed: list[int]) -> None:
        for code, times in zip(self.code, executed, strict=True):
            self.counters.instructions += times * code.instructions
            for op, count in code.by_op.items():
                if times:
                    self.counters.by_op[op] = self.counters.by_op.get(op, 0) + times * count
        for region in self.memory.regions:
            self.counters.add_accesses("global", region.log)
        self.counters.add_accesses("shared", batch.shared.log)

    def _check_races(self, batch: Batch, cause: Fault | None = None) -> None:
        options = self.options
        for record in (*self.records.values(), Record(batch.shared)):
            try:
                record.check(batch, options.races, options.races and options.races_between_ctas)
            except Fault as race:
                raise race from cause


class _Scheduler:
    """Moves the threads of a batch through the blocks. While all are at one block, ``together`` is its number."""

    def __init__(self, batch: Batch, code: list[Code], options: Options, random: np.random.Generator):
        self.batch, self.code, self.options, self.random = batch, code, options, random
        self.free = options.order == "interleaved"
        self.together: int | None = 0 if self.free else None
        self.at = np.zeros(batch.size, np.int64)
        self.state = np.zeros(batch.size, np.int8)
        self.members = np.zeros(batch.size, np.uint32)  # whom each thread at a warp barrier waits for
        self.executed = [0] * len(code)  # times, in warps

    def run(self) -> None:
        for _ in range(STEPS):
            if self.together is not None:
                self._step_together(self.together)
            elif not self._step_apart():
                return
        raise Fault(f"{self.batch.program.name} does not end: {STEPS} basic blocks were executed")

    def _step_together(self, block: int) -> None:
        if block >= len(self.code):
            raise Fault("threads run past the end of the kernel")
        code, batch = self.code[block], self.batch
        self.executed[block] += batch.size // 32
        taken = code.function(batch, None)
        if code.ending in ("jump", "leave") and taken is not None:
            if not taken.any():
                self.together = block + 1
            elif not taken.all():
                self._part(block, np.broadcast_to(taken, (batch.size,)))
                return
        if code.ending == "warp barrier" and (batch.members != warps.ALL).any():
            self._part(block, np.ones(batch.size, bool))
        elif taken is not None and not taken.any():
            pass
        elif code.ending == "jump":
            self.together = code.target
        elif code.ending == "leave":
            self.state[:], self.together = GONE, None
        else:
            if code.ending == "barrier":
                batch.epoch = batch.epoch + 1
            elif code.ending == "warp barrier":
                batch.met(None)
            self.together = block + 1

    def _part(self, block: int, taken: np.ndarray) -> None:
        self.together = None
        self._arrive(block, np.ones(self.batch.size, bool), taken)

    def _step_apart(self) -> bool:
        """False when all threads have left."""
        may = self.state == RUNNING
        if not may.any():
            if (self.state == GONE).all():
                return False
            self._stuck()
        if not self.free:
            may &= self._turn(may)
        place = np.where(may, self.at, NOWHERE)
        block = int(place.min())
        if block >= len(self.code):
            raise Fault("threads run past the end of the kernel")
        if self.free and (self.at == block).all() and may.all():
            self.together = block
            return True
        mask = place == block
        code = self.code[block]
        self.executed[block] += int(mask.reshape(-1, 32).any(1).sum())
        everyone = bool(mask.all())
        taken = code.function(self.batch, None if everyone else mask)
        self._arrive(block, mask, mask if taken is None else mask & taken)
        return True

    def _arrive(self, block: int, mask: np.ndarray, taken: np.ndarray) -> None:
        """Moves the threads of ``mask`` on after a block; those in ``taken`` follow the last instruction."""
        code = self.code[block]
        self.at[mask] = block + 1
        if code.ending == "jump":
            self.at[taken] = code.target
        elif code.ending == "leave":
            self.state[taken] = GONE
        elif code.ending == "barrier":
            self.state[mask] = AT_BARRIER
            self._release_ctas()
        elif code.ending == "warp barrier":
            self.state[mask] = AT_WARP_BARRIER
            self.members[mask] = np.broadcast_to(self.batch.members, mask.shape)[mask]
            self._release_warps()

    def _release_ctas(self) -> None:
        """CTAs of which every thread waits at the barrier go on."""
        rows = (-1, self.batch.threads)
        complete = (self.state.reshape(rows) == AT_BARRIER).all(1)
        places = self.at.reshape(rows)
        if (complete & (places != places[:, :1]).any(1)).any():
            self._stuck()
        if complete.any():
            self.state[np.repeat(complete, self.batch.threads)] = RUNNING
            self.batch.epoch = self.batch.epoch + complete

    def _release_warps(self) -> None:
        """Threads of which every partner waits as well go on."""
        waiting = self.state == AT_WARP_BARRIER
        for warp in np.flatnonzero(waiting.reshape(-1, 32).any(1)):
            lanes = slice(32 * warp, 32 * warp + 32)
            for members in np.unique(self.members[lanes][waiting[lanes]]):
                same = waiting[lanes] & (self.members[lanes] == members)
                named = (members >> np.arange(32, dtype=np.uint32)) & np.uint32(1) == 1
                if (same & ~named).any():
                    raise Fault(
                        f"{self.batch.describe(32 * int(warp))}: a thread waits for its warp, but not for itself"
                    )
                if (same == named).all():
                    self.state[lanes][same] = RUNNING
                    self.batch.met(np.where(np.arange(len(self.batch.warp_epoch)) == warp, members, 0))

    def _stuck(self) -> None:
        waiting = np.flatnonzero((self.state == AT_BARRIER) | (self.state == AT_WARP_BARRIER))
        lane = int(waiting[0])
        rows = slice(lane // self.batch.threads * self.batch.threads, None)
        group = rows.start + np.arange(self.batch.threads)
        last = self.code[self.at[lane] - 1]
        where = self.batch.program.blocks[self.at[lane] - 1].body[-1].where
        gone = [n for n in group if self.state[n] == GONE]
        elsewhere = [n for n in group if self.state[n] != GONE and self.at[n] != self.at[lane]]
        why = "all threads wait"
        if elsewhere:
            other = self.batch.program.blocks[self.at[elsewhere[0]] - 1].body[-1].where
            why = f"{self.batch.describe(int(elsewhere[0]))} waits elsewhere ({other})"
        elif gone:
            why = f"{self.batch.describe(int(gone[0]))} has left the kernel"
        raise Fault(f"divergent {last.ending}: {self.batch.describe(lane)} waits ({where}), but {why}")

    def _turn(self, may: np.ndarray) -> np.ndarray:
        """The warps whose turn it is, as lanes."""
        rows = may.reshape(len(self.batch.ctas), -1, 32).any(2)
        if self.options.order == "random":
            chosen = rows & (self.random.random(rows.shape) < 0.5)
            none = ~chosen.any(1)
            chosen[none] = rows[none]
        else:
            last = self.options.order == "backward"
            pick = rows.shape[1] - 1 - rows[:, ::-1].argmax(1) if last else rows.argmax(1)
            chosen = np.arange(rows.shape[1]) == pick[:, None]
        return np.repeat(chosen.reshape(-1), 32)
