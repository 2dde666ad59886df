"""Counts of a launch: instructions, and how much memory traffic they cause, from the log of accesses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import Access
from .races import Record

SECTOR = 32  # bytes that a GPU moves at least


@dataclass
class Traffic:
    """One kind of access, as "global load" or "shared store"."""

    requests: int = 0  # instructions of a warp in which at least one thread takes part
    sectors: int = 0  # of 32 bytes, different ones within a request
    useful: int = 0  # bytes, different ones within a request

    @property
    def efficiency(self) -> float:
        """Useful bytes of those that are moved."""
        return self.useful / max(1, self.sectors * SECTOR)


@dataclass
class Counters:
    """What a launch did. Bytes are those of storages that are tracked (up to 256 MB)."""

    instructions: int = 0  # executed by warps
    by_op: dict[str, int] = field(default_factory=dict)  # of these, by opcode without modifiers
    traffic: dict[str, Traffic] = field(default_factory=dict)
    unique_read: int = 0  # bytes of global memory that somebody read: what a perfect cache fetches
    unique_written: int = 0
    padding_read: int = 0  # of these, bytes that are no element of any argument
    padding_written: int = 0

    def add_accesses(self, space: str, log: list[Access]) -> None:
        """Counts the accesses to one region."""
        for kind in ("load", "store", "atomic"):
            chosen = [access for access in log if access.kind == kind]
            if chosen:
                _add(self.traffic.setdefault(f"{space} {kind}", Traffic()), chosen)

    def add_bytes(self, record: Record, tensors: list) -> None:
        """Counts the bytes of a storage that were touched, and how many of them lie in no element of ``tensors``."""
        member = _members(tensors, len(record.writer) * record.element).reshape(-1, record.element).all(1)
        for kind, who in (("read", record.reader), ("written", record.writer)):
            touched = who != 0
            for name, elements in ((f"unique_{kind}", touched), (f"padding_{kind}", touched & ~member)):
                setattr(self, name, getattr(self, name) + int(elements.sum()) * record.element)


def _members(tensors: list, size: int) -> np.ndarray:
    """Which bytes of a storage belong to an element of a tensor."""
    import torch

    member = torch.zeros(size, dtype=torch.bool)
    for tensor in tensors:
        if tensor.numel():
            each = tensor.element_size()
            strides = [stride * each for stride in tensor.stride()]
            member.as_strided((*tensor.shape, each), (*strides, 1), tensor.storage_offset() * each).fill_(True)
    return member.numpy()


def _add(traffic: Traffic, log: list[Access]) -> None:
    starts, warps, requests, widths = [], [], [], []
    for number, access in enumerate(log):
        first = access.index if access.index.ndim == 1 else access.index[0]
        starts.append(first * access.size)
        warps.append(access.lanes // 32)
        requests.append(np.full(len(access.lanes), number))
        widths.append(np.full(len(access.lanes), access.size * (access.index.size // len(access.lanes))))
    start, warp, request, width = (np.concatenate(x) for x in (starts, warps, requests, widths))
    order = np.lexsort((start, warp, request))
    start, warp, request, width = start[order], warp[order], request[order], width[order]
    new_request = np.append(True, (np.diff(request) != 0) | (np.diff(warp) != 0))
    new_start = new_request | np.append(True, np.diff(start) != 0)
    # An access is aligned to its width, of at most 32 bytes, and so lies in one sector.
    new_sector = new_request | np.append(True, np.diff(start // SECTOR) != 0)
    traffic.requests += int(new_request.sum())
    traffic.sectors += int(new_sector.sum())
    traffic.useful += int(width[new_start].sum())
