"""The threads of some CTAs, executed together: their registers, and what translated instructions ask of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import warps
from .faults import Fault
from .memory import Access, GlobalMemory, Region, elements_of, modify
from .operations import UNSIGNED
from .parse import Instruction, Program

POISON = {1: False, 2: 0x7FEB, 4: 0x7FEBFEE0, 8: 0x7FFBFEE07FEBFEE0}  # NaN as a float, far from any address


# What the hardware fills in, from a thread's number in its CTA, the CTA's number in the grid, and the batch.
SPECIAL_REGISTERS: dict[str, Callable[[np.ndarray, np.ndarray, Batch], object]] = {
    "tid.x": lambda thread, cta, b: thread,
    "tid.y": lambda thread, cta, b: [0],
    "tid.z": lambda thread, cta, b: [0],
    "ntid.x": lambda thread, cta, b: [b.threads],
    "ntid.y": lambda thread, cta, b: [1],
    "ntid.z": lambda thread, cta, b: [1],
    "laneid": lambda thread, cta, b: thread % 32,
    "warpid": lambda thread, cta, b: thread // 32,
    "ctaid.x": lambda thread, cta, b: cta % b.grid[0],
    "ctaid.y": lambda thread, cta, b: cta // b.grid[0] % b.grid[1],
    "ctaid.z": lambda thread, cta, b: cta // (b.grid[0] * b.grid[1]),
    "nctaid.x": lambda thread, cta, b: [b.grid[0]],
    "nctaid.y": lambda thread, cta, b: [b.grid[1]],
    "nctaid.z": lambda thread, cta, b: [b.grid[2]],
}


class Registers(dict):
    """By name; one that nobody wrote holds a pattern that shows wherever it is used."""

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        self.sizes = sizes

    def __missing__(self, name: str) -> np.ndarray:
        size = self.sizes[name]
        return np.array([POISON[size]], np.bool_ if size == 1 else UNSIGNED[size])


class Batch:
    """``size`` threads, CTA after CTA. ``mask`` arguments say which of them take part; None is all."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        ctas: np.ndarray,  # numbers in the grid
        memory: GlobalMemory,
        shared: int,  # bytes of a CTA
        parameters: dict[str, bytes],
        constants: Region | None,
    ):
        self.program, self.grid, self.ctas, self.threads = program, grid, ctas, program.threads
        self.memory, self.parameters, self.constants = memory, parameters, constants
        self.size = len(ctas) * self.threads
        self.registers = Registers(program.registers)
        self.lanes = np.arange(self.size)
        self.epoch = np.zeros(len(ctas), np.int64)
        self.warp_epoch = np.zeros(self.size // 32, np.int64)
        self.partial: list[tuple[int, int]] = []  # synchronisations of parts of warps: warp, bits of the lanes
        self.members = np.zeros(1, np.uint32)  # the operand of the last bar.warp.sync
        self.shared_bytes = -(-shared // 16) * 16
        self.shared = self._private("shared memory", self.shared_bytes * len(ctas))
        self.local_bytes = -(-program.size_of("local") // 16) * 16
        self.local = self._private("local memory", self.local_bytes * self.size)
        self._special: dict[str, np.ndarray] = {}

    @staticmethod
    def _private(name: str, size: int) -> Region:
        return Region(name, 0, np.full(size, 0xFF, np.uint8), 4, tracked=name == "shared memory", written=True)

    # What a thread knows without memory.

    def describe(self, lane: int) -> str:
        cta, thread = int(self.ctas[lane // self.threads]), lane % self.threads
        x, y, _ = self.grid
        place = (cta % x, cta // x % y, cta // (x * y))
        return f"thread {thread} of CTA {place if self.grid[1:] != (1, 1) else cta}"

    def special(self, name: str) -> np.ndarray:
        """One of ``SPECIAL_REGISTERS``."""
        if name not in self._special:
            value = SPECIAL_REGISTERS[name](self.lanes % self.threads, np.repeat(self.ctas, self.threads), self)
            self._special[name] = np.asarray(value).astype(np.uint32)
        return self._special[name]

    def symbol(self, name: str) -> np.ndarray:
        array = self.program.arrays[name]
        base = self.constants.base if array.space in ("global", "const") else 0
        return np.array([base + array.offset], np.int64)

    def parameter(self, name: str, dtype: np.dtype, offset: int) -> np.ndarray:
        return np.frombuffer(self.parameters[name], dtype, 1, offset)

    @staticmethod
    def both(mask: np.ndarray | None, predicate: np.ndarray) -> np.ndarray:
        return predicate if mask is None else mask & predicate

    def _active(self, mask: np.ndarray | None) -> np.ndarray:
        """Places of the active threads."""
        if mask is None:
            return self.lanes
        if mask.size == 1:
            return self.lanes if mask[0] else self.lanes[:0]
        return np.flatnonzero(mask)

    def _spread(self, lanes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Values of some lanes, ``(count, n)``, as arrays of all lanes."""
        if len(lanes) == self.size:
            return values
        out = np.zeros((len(values), self.size), values.dtype)
        out[:, lanes] = values
        return out

    # Memory.

    def _places(self, i: Instruction, lanes: np.ndarray, space: str, address: np.ndarray, width: int):
        """For each region that is touched: the region, the active lanes in it, and their byte offsets."""
        if address.size == 1:
            address = np.broadcast_to(address, lanes.shape)
        elif len(lanes) < self.size:
            address = address[lanes]
        if (address & (width - 1)).any():
            n = int((address & (width - 1)).astype(bool).argmax())
            raise Fault(
                f"misaligned: {self.describe(lanes[n])} accesses {width} bytes at address {address[n]:#x}: {i.where}"
            )
        if space == "global":
            found = self.memory.find(address, width)
            if isinstance(found, int):
                self._out_of_bounds(i, lanes[found], self.memory.describe(int(address[found])), width)
            return [
                (region, lanes, address - region.base) if at is None else (region, lanes[at], address[at] - region.base)
                for region, at in found
            ]
        region, size = (self.shared, self.shared_bytes) if space == "shared" else (self.local, self.local_bytes)
        outside = (address < 0) | (address + width > size)
        if outside.any():
            n = int(outside.argmax())
            self._out_of_bounds(i, lanes[n], f"byte {address[n]} of {size} bytes of {space} memory", width)
        owner = lanes // self.threads if space == "shared" else lanes
        return [(region, lanes, address + owner * size)]

    def _out_of_bounds(self, i: Instruction, lane: int, where: str, width: int) -> None:
        raise Fault(f"out of bounds: {self.describe(int(lane))} accesses {width} bytes at {where}: {i.where}")

    def _log(self, region: Region, i: Instruction, kind: str, lanes: np.ndarray, index: np.ndarray, size: int,
             values: np.ndarray | None = None) -> None:  # fmt: skip
        if region.tracked:
            region.log.append(
                Access(i, kind, lanes, index, size, values, self.epoch, self.warp_epoch, len(self.partial))
            )

    def load(self, i: Instruction, mask: np.ndarray | None, space: str, address: np.ndarray, size: int, count: int):
        """``count`` elements of ``size`` bytes for each thread: ``(count, size of the batch)``."""
        lanes = self._active(mask)
        if not len(lanes):
            return np.zeros((count, self.size), UNSIGNED[size])
        places = self._places(i, lanes, space, address, size * count)
        out = None if len(places) == 1 else np.zeros((count, self.size), UNSIGNED[size])
        for region, some, offset in places:
            index = elements_of(offset, size, count)
            values = region.load(index, size, i).reshape(count, -1)
            self._log(region, i, "load", some, index, size)
            if out is None:
                return self._spread(some, values)
            out[:, some] = values
        return out

    def store(self, i: Instruction, mask: np.ndarray | None, space: str, address: np.ndarray, size: int, values: list):
        lanes = self._active(mask)
        if not len(lanes):
            return
        count = len(values)
        for region, some, offset in self._places(i, lanes, space, address, size * count):
            index = elements_of(offset, size, count)
            chosen = [v if v.size == 1 or len(some) == self.size else v[some] for v in values]
            stored = chosen[0] if count == 1 else np.array([np.broadcast_to(v, some.shape) for v in chosen])
            region.store(index, stored, size)
            self._log(region, i, "store", some, index, size, stored)

    def atomic(
        self,
        i: Instruction,
        mask: np.ndarray | None,
        space: str,
        address: np.ndarray,
        dtype: np.dtype,
        count: int,
        change: Callable,
        operands: list[list[np.ndarray]],  # each ``count`` arrays
    ) -> np.ndarray:
        """Read, change, write, one thread after the other; what each of them read: ``(count, size of the batch)``."""
        lanes, out = self._active(mask), np.zeros((count, self.size), dtype)
        if not len(lanes):
            return out
        for region, some, offset in self._places(i, lanes, space, address, dtype.itemsize * count):
            index = elements_of(offset, dtype.itemsize, count)
            for n in range(count):
                values = [np.broadcast_to(group[n], (self.size,))[some] for group in operands]

                def renew(old: np.ndarray, places: np.ndarray, values: list = values) -> np.ndarray:
                    return change(old.view(dtype), *(v[places] for v in values)).view(old.dtype)

                old = modify(region, index if count == 1 else index[n], dtype.itemsize, renew)
                out[n, some] = old.view(dtype)
            self._log(region, i, "atomic", some, index, dtype.itemsize)
        return out

    # Threads of a warp together.

    def _meet(self, i: Instruction, mask: np.ndarray | None, members: np.ndarray) -> np.ndarray | None:
        """Checks that the threads that an instruction names are here, and notes that they met."""
        if mask is not None:
            mask = np.broadcast_to(mask, (self.size,))
            mask = None if mask.all() else mask
        warps.check_members(i, mask, members, self.size, self.describe)
        self.met(None if mask is None else warps.bits(mask))
        return mask

    def met(self, lanes: np.ndarray | None) -> None:
        """Threads of each warp with these bits (None: all threads) synchronised."""
        whole = np.ones(len(self.warp_epoch), bool) if lanes is None else lanes == warps.ALL
        self.warp_epoch = self.warp_epoch + whole
        if self.threads == 32:  # as good as a barrier
            self.epoch = self.epoch + whole
        if lanes is not None:
            self.partial += [(int(w), int(lanes[w])) for w in np.flatnonzero((lanes != 0) & ~whole)]

    def shuffle(self, i: Instruction, mask, members, value, mode: str, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        mask = self._meet(i, mask, members)
        lanes = warps.source_lanes(mode, b, c)
        if mask is not None:
            sources = np.broadcast_to(lanes, (self.size // 32, 32)) + np.arange(0, self.size, 32)[:, None]
            wrong = mask & ~mask[sources.reshape(-1)]
            if wrong.any():
                raise Fault(f"{self.describe(int(wrong.argmax()))} reads from a thread that is not here: {i.where}")
        return warps.shuffle(value, lanes, self.size)

    def vote(self, i: Instruction, mask, members, mode: str, value: np.ndarray) -> np.ndarray:
        return warps.vote(mode, value, self._meet(i, mask, members), self.size)

    def reduce(self, i: Instruction, mask, members, name: str, value: np.ndarray) -> np.ndarray:
        return warps.reduce(name, value, self._meet(i, mask, members), self.size)

    def active_lanes(self, mask: np.ndarray | None) -> np.ndarray:
        active = np.ones(self.size, bool) if mask is None else np.broadcast_to(mask, (self.size,))
        return np.repeat(warps.bits(active), 32)

    def _rows(self, i: Instruction, mask, address: np.ndarray, count: int):
        """The lanes that give the addresses of matrix rows, and the 8 elements that each one names.

        Lane l names row l % 8 of matrix l // 8.
        """
        mask = self._meet(i, mask, np.array([warps.ALL]))
        lanes = self._active(mask)
        lanes = lanes[lanes % 32 < 8 * count]
        ((region, lanes, offset),) = self._places(i, lanes, "shared", np.broadcast_to(address, (self.size,)), 16)
        return region, lanes, elements_of(offset, 2, 8)

    def load_matrices(self, i: Instruction, mask, address: np.ndarray, count: int, transposed: bool) -> np.ndarray:
        region, lanes, index = self._rows(i, mask, address, count)
        rows = region.load(index, 2, i).T.reshape(-1, count, 8, 8)  # (warps, count, row, column)
        self._log(region, i, "load", lanes, index, 2)
        words = warps.matrices_to_lanes(rows, transposed)
        return self._spread(self._active(mask), words)

    def store_matrices(self, i: Instruction, mask, address: np.ndarray, values: list, transposed: bool) -> None:
        region, lanes, index = self._rows(i, mask, address, len(values))
        active = self._active(mask)
        words = np.stack([np.broadcast_to(v, (self.size,))[active] for v in values])
        rows = np.ascontiguousarray(warps.lanes_to_matrices(words, transposed).reshape(-1, 8).T)
        region.store(index, rows, 2)
        self._log(region, i, "store", lanes, index, 2, rows)
