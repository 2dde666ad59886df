"""Memory that knows whose it is: bounds, alignment, shared words never written, and a log of who touched what.

A :class:`Region` is one piece of memory: the storage of a tensor, the shared memory of all CTAs of a batch. An access
is checked and carried out at once. Whether it raced with another one is decided later, from the log (``races.py``),
because that is the same work for a thousand accesses as for one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from .faults import Fault
from .operations import UNSIGNED
from .parse import Instruction

TRACKED_BYTES = 2**28  # larger storages are checked for bounds alone: a record for each element would be too large
STORAGE_ALIGNMENT = 16  # bytes; a GPU's allocations are aligned to 256, and Triton looks at 16


@dataclass
class Access:
    """What one instruction did to one region: an entry of the log."""

    instruction: Instruction
    kind: str  # "load", "store" or "atomic"
    lanes: np.ndarray  # (n), places of the threads in their batch
    index: np.ndarray  # (n) or (count, n), the elements touched, in units of their size
    size: int  # bytes of an element
    values: np.ndarray | None  # as index: what was stored
    epoch: np.ndarray  # of each CTA: barriers that it has passed
    warp_epoch: np.ndarray  # of each warp: synchronisations of the whole warp
    synchronised: int  # synchronisations of parts of warps before this access, in the whole batch


class Region:
    """Bytes from an address on. With ``written``, reading a byte that nobody wrote is a fault."""

    def __init__(
        self, name: str, base: int, data: np.ndarray, element: int, tracked: bool = True, written: bool = False
    ):
        self.name, self.base, self.data = name, base, data
        self.element = element  # bytes of the smallest element of the tensors that lie here
        self.tracked = tracked
        self.written = np.zeros(len(data), np.uint8) if written else None
        self.log: list[Access] = []
        self._views: dict[int, np.ndarray] = {}

    def words(self, size: int) -> np.ndarray:
        """The memory as unsigned integers of ``size`` bytes."""
        if size not in self._views:
            self._views[size] = self.data[: len(self.data) // size * size].view(UNSIGNED[size])
        return self._views[size]

    def load(self, index: np.ndarray, size: int, instruction: Instruction) -> np.ndarray:
        if self.written is not None:
            all_written = UNSIGNED[size](int.from_bytes(b"\1" * size, "little"))
            present = self.written.view(UNSIGNED[size])[index] == all_written
            if not present.all():
                raise Fault(f"reads {self.name} that nobody has written: {instruction.where}")
        return self.words(size)[index]

    def store(self, index: np.ndarray, values: np.ndarray, size: int) -> None:
        self.words(size)[index] = values
        if self.written is not None:
            self.written.view(UNSIGNED[size])[index] = UNSIGNED[size](int.from_bytes(b"\1" * size, "little"))


class GlobalMemory:
    """The storages of a launch's tensors. Every other address is out of bounds."""

    def __init__(self, tensors: list[tuple[str, object]], constants: Region | None):
        storages: dict[int, tuple[list[str], list[int], int]] = {}
        for name, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                names, elements, _ = storages.setdefault(storage.data_ptr(), ([], [], storage.nbytes()))
                names.append(name)
                elements.append(tensor.element_size())
        self.regions = [constants] if constants else []
        for base, (names, elements, size) in storages.items():
            if base % STORAGE_ALIGNMENT:
                raise ValueError(
                    f"the storage of {', '.join(names)} begins at {base:#x}; a GPU's are aligned: clone it"
                )
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
            self.regions.append(Region("/".join(names), base, data, min(elements), size <= TRACKED_BYTES))
        self.regions.sort(key=lambda region: region.base)
        self.bases = np.array([r.base for r in self.regions], np.int64)
        self.ends = np.array([r.base + len(r.data) for r in self.regions], np.int64)

    def find(self, address: np.ndarray, width: int) -> list[tuple[Region, np.ndarray | None]] | int:
        """The regions in which accesses of ``width`` bytes lie.

        Each comes with the places in ``address`` that are in it (None: all of them). If an access lies in no region,
        the place of the first such is returned instead.
        """
        first, last = int(address.min()), int(address.max())
        at = int(np.searchsorted(self.bases, first, "right")) - 1
        if at >= 0 and last + width <= self.ends[at]:
            return [(self.regions[at], None)]
        each = np.searchsorted(self.bases, address, "right") - 1
        outside = each < 0
        if self.regions:
            outside = outside | (address + width > self.ends[np.maximum(each, 0)])
        if outside.any():
            return int(outside.argmax())
        return [(self.regions[n], np.flatnonzero(each == n)) for n in np.unique(each)]

    def describe(self, address: int) -> str:
        """Where an address outside of everything lies, seen from the nearest storage below it."""
        at = int(np.searchsorted(self.bases, address, "right")) - 1
        if at < 0:
            return f"address {address:#x}, below every storage"
        region = self.regions[at]
        if address - region.base > 2**40:
            return f"address {address:#x}, near no storage"
        return f"byte {address - region.base} of {region.name}, which has {len(region.data)}"


def elements_of(offset: np.ndarray, size: int, count: int) -> np.ndarray:
    """The elements that accesses at these byte offsets touch: ``(n)``, or ``(count, n)`` for vectors."""
    index = offset >> (size.bit_length() - 1)
    return index if count == 1 else index + np.arange(count)[:, None]


def modify(region: Region, index: np.ndarray, size: int, change) -> np.ndarray:
    """Read, change, write, one thread after the other where several share an element; what each of them read.

    ``change(old, places)`` gives the new values of the elements at these places of ``index``.
    """
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    turn = np.arange(len(index)) - np.repeat(begins, np.diff(np.append(begins, len(index))))
    words, out = region.words(size), np.empty(len(index), UNSIGNED[size])
    for n in range(int(turn.max()) + 1):
        places = order[turn == n]
        out[places] = old = words[index[places]]
        words[index[places]] = change(old, places)
    return out
