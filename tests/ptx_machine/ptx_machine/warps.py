"""Instructions in which the threads of a warp work together: shuffles, votes, reductions, matrices in shared memory.

All threads that the instruction names must execute it together. ``mask`` is None where every thread of the batch does.
"""

from __future__ import annotations

import functools

import numpy as np

from . import floats
from .faults import Fault
from .parse import Instruction

ALL = np.uint32(0xFFFFFFFF)
LANES = np.arange(32)
POWERS = np.uint32(1) << np.arange(32, dtype=np.uint32)


def bits(active: np.ndarray) -> np.ndarray:
    """A word for each warp, with a bit for every lane that is True."""
    return (active.reshape(-1, 32) * POWERS).sum(1, dtype=np.uint32)


def check_members(i: Instruction, mask: np.ndarray | None, members: np.ndarray, size: int, describe) -> None:
    """Faults unless in every warp exactly the lanes in ``members`` are here."""
    if mask is None and members.size == 1 and members[0] == ALL:
        return
    active = np.ones(size, bool) if mask is None else mask
    here = np.repeat(bits(active), 32)
    wrong = active & (np.broadcast_to(members, (size,)) != here)
    if wrong.any():
        lane = int(wrong.argmax())
        named = int(np.broadcast_to(members, (size,))[lane])
        raise Fault(
            f"not all threads of a warp are here, or more than the instruction names: {describe(lane)} executes it "
            f"with lanes {int(here[lane]):#x}, and it names {named:#x}: {i.where}"
        )


def source_lanes(mode: str, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """For ``shfl``: the lane from which each lane reads, ``(1 or warps, 32)``."""
    b, c = (x.astype(np.int64).reshape(-1, 32) if x.size > 1 else x.astype(np.int64).reshape(1, 1) for x in (b, c))
    segment, clamp = (c >> 8) & 31, c & 31
    bottom = LANES & segment
    limit = bottom | (clamp & ~segment & 31)
    if mode == "bfly":
        chosen = LANES ^ (b & 31)
    elif mode == "idx":
        chosen = bottom | (b & ~segment & 31)
    else:
        chosen = LANES - (b & 31) if mode == "up" else LANES + (b & 31)
    inside = chosen >= limit if mode == "up" else chosen <= limit
    return np.where(inside, chosen, LANES)


def shuffle(value: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
    rows = np.broadcast_to(value, (size,)).reshape(-1, 32)
    if len(lanes) == 1:
        return rows.take(lanes[0], axis=1).reshape(-1)
    return np.take_along_axis(rows, lanes, 1).reshape(-1)


def vote(mode: str, value: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
    """``ballot``: the bits of the lanes that say True; ``any``, ``all``, ``uni``: a predicate."""
    active = np.ones((size // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
    yes = np.broadcast_to(value, (size,)).reshape(-1, 32) & active
    if mode == "ballot":
        return np.repeat(bits(yes), 32)
    some, every = yes.any(1), (yes | ~active).all(1)
    return np.repeat({"any": some, "all": every, "uni": every | ~some}[mode], 32)


def reduce(name: str, value: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
    """``redux``: one result of the active lanes of each warp."""
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }  # fmt: skip
    function = functions[name]
    if value.dtype == np.float32:
        function = {"min": floats.minimum, "max": floats.maximum}[name]
    rows = np.broadcast_to(value, (size,)).reshape(-1, 32)
    if mask is not None:  # the others get the value of an active lane, which changes no minimum and no logic
        active = mask.reshape(-1, 32)
        first = np.take_along_axis(rows, active.argmax(1)[:, None], 1)
        neutral = np.zeros(1, value.dtype) if name in ("add", "xor") else first
        rows = np.where(active, rows, neutral)
    out = functools.reduce(function, (rows[:, n] for n in range(32)))
    return np.repeat(out.astype(value.dtype), 32)


def matrices_to_lanes(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """8x8 matrices of 16-bit numbers, ``(warps, count, 8, 8)``, as words of lanes, ``(count, 32 warps)``.

    Lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l // 4.
    """
    rows = rows.swapaxes(2, 3) if transposed else rows
    words = np.ascontiguousarray(rows).view(np.uint32)  # (warps, count, 8, 4)
    return np.ascontiguousarray(words.swapaxes(0, 1)).reshape(rows.shape[1], -1)


def lanes_to_matrices(words: np.ndarray, transposed: bool) -> np.ndarray:
    """The inverse: ``(count, 32 warps)`` words to ``(warps, count, 8, 8)``."""
    count = len(words)
    rows = np.ascontiguousarray(words.reshape(count, -1, 8, 4).swapaxes(0, 1)).view(np.uint16)
    return np.ascontiguousarray(rows.swapaxes(2, 3)) if transposed else rows
