"""Which accesses raced: two threads touched one element, at least one wrote, and nothing put one before the other.

Order comes from a barrier of the CTA, and within a warp from a synchronisation of its threads. Nothing orders the CTAs
of a launch. Two threads may store the same value to one element, as Triton's copies of a small tensor do; a thread may
then read that value if it has stored it itself. Atomic accesses do not race with each other.

The check comes in three steps, each for the few elements that the step before could not clear: elements of a single
thread; elements of a single thread between two barriers; and a sort of the rest by time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from .batch import Batch
from .faults import Fault
from .memory import Access, Region
from .operations import UNSIGNED

MANY = -1  # a CTA that stands for several


@dataclass
class Touches:
    """The log of a region, one row for every element and thread."""

    element: np.ndarray
    lane: np.ndarray  # of the thread, in its batch
    cta: np.ndarray  # in its batch
    epoch: np.ndarray
    warp_epoch: np.ndarray
    writes: np.ndarray  # bool, also for atomic accesses
    atomic: np.ndarray
    value: np.ndarray  # 0 for loads and atomic accesses
    entry: np.ndarray  # the place in the log; increases with time

    def __getitem__(self, rows) -> Touches:
        return Touches(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.element)


def touches(log: list[Access], element: int, threads: int) -> Touches:
    """The log in units of ``element`` bytes, which divides the size of every access."""
    rows: list[tuple[np.ndarray, ...]] = []
    for number, access in enumerate(log):
        parts, count = access.size // element, access.index.size // len(access.lanes)
        index = access.index.reshape(-1)
        values = np.zeros(1, UNSIGNED[element])
        if access.values is not None:
            flat = np.ascontiguousarray(np.broadcast_to(access.values, access.index.shape)).reshape(-1)
            values = flat.view(UNSIGNED[element])
        if parts > 1:
            index = (index[:, None] * parts + np.arange(parts)).reshape(-1)
        lanes = np.repeat(np.tile(access.lanes, count), parts) if parts > 1 or count > 1 else access.lanes
        flags = np.full(len(index), access.kind != "load"), np.full(len(index), access.kind == "atomic")
        rows.append(
            (index, lanes, lanes // threads, access.epoch[lanes // threads], access.warp_epoch[lanes // 32], *flags,
             np.broadcast_to(values, len(index)), np.full(len(index), number))
        )  # fmt: skip
    return Touches(*(np.concatenate(column) for column in zip(*rows, strict=True)))


class Record:
    """Who touched the elements of a region so far, for the length of a launch."""

    def __init__(self, region: Region):
        self.region, self.element = region, region.element
        elements = -(-len(region.data) // self.element)
        self.writer = np.zeros(elements, np.int32)  # thread of the grid + 1
        self.reader = np.zeros(elements, np.int32)  # CTA of the grid + 1, or MANY

    def refine(self, element: int) -> None:
        """Continues with smaller elements."""
        parts = self.element // element
        self.writer, self.reader, self.element = np.repeat(self.writer, parts), np.repeat(self.reader, parts), element

    def check(self, batch: Batch, within_ctas: bool, between_ctas: bool) -> None:
        """Enters what the threads of a batch did to the region, and empties its log.

        Raises:
            Fault: accesses raced, of one CTA (``within_ctas``) or of two (``between_ctas``).
        """
        log, self.region.log = self.region.log, []
        threads = batch.threads
        if not log:
            return
        smallest = min(access.size for access in log)
        if smallest < self.element:
            self.refine(smallest)
        rows = touches(log, self.element, threads)
        _excuse_first_looks(rows, log)
        report = _Reporter(self, log, rows, batch.describe, batch.partial)
        grid_thread = (batch.ctas[rows.cta] * threads + rows.lane % threads + 1).astype(np.int32)
        suspect = self._enter(rows, grid_thread, threads, report if between_ctas else None)
        if within_ctas and suspect.any():
            _check_order(rows[np.flatnonzero(suspect)], report)

    def _enter(self, rows: Touches, thread: np.ndarray, threads: int, report: _Reporter | None) -> np.ndarray:
        """Notes who touched what; the rows of elements that a second thread touched as well, where one wrote."""
        cta = (thread - 1) // threads + 1
        writes = np.flatnonzero(rows.writes)
        at, mine = rows.element[writes], thread[writes]
        if len(writes):
            earlier, readers = self.writer[at], self.reader[at]
            if report:
                other = (earlier != 0) & ((earlier - 1) // threads + 1 != cta[writes]) & ~rows.atomic[writes]
                other |= (readers != 0) & (readers != cta[writes])
                report.between_ctas(writes, other)
            self.writer[at] = mine
            shared = self.writer[at] != mine
            if report:
                other = ((self.writer[at] - 1) // threads + 1 != cta[writes]) & ~rows.atomic[writes]
                report.between_ctas(writes, other)
        reads = np.flatnonzero(~(rows.writes | rows.atomic))
        writer = self.writer[rows.element[reads]]
        other = (writer != 0) & (writer != thread[reads])
        if report:
            report.between_ctas(reads, other & ((writer - 1) // threads + 1 != cta[reads]))
        self._enter_readers(rows.element[reads], cta[reads])
        suspect = np.zeros(len(rows), bool)
        if len(writes) and (shared.any() or other.any()):
            elements = np.unique(np.concatenate([at[shared], rows.element[reads[other]]]))
            suspect = np.isin(rows.element, elements)
        return suspect

    def _enter_readers(self, at: np.ndarray, cta: np.ndarray) -> None:
        earlier = self.reader[at]
        new = np.where((earlier == 0) | (earlier == cta), cta, MANY).astype(np.int32)
        self.reader[at] = new
        self.reader[at[self.reader[at] != new]] = MANY


def _excuse_first_looks(rows: Touches, log: list[Access]) -> None:
    """A plain load counts as atomic if its thread later compares and swaps the same element.

    Compilers begin so the loop that stands for an atomic operation which the hardware lacks. The comparison finds out
    whether the value was old.
    """
    swaps = [access.kind == "atomic" and "cas" in access.instruction.modifiers for access in log]
    if any(swaps):
        key = rows.element * (int(rows.lane.max()) + 1) + rows.lane
        swapped = np.array(swaps)[rows.entry]
        rows.atomic |= np.isin(key, key[swapped]) & ~rows.writes


def _check_order(rows: Touches, report: _Reporter) -> None:
    """Faults unless barriers order all accesses that conflict."""
    phases, phase = np.unique(rows.cta * 2**32 + rows.epoch, return_inverse=True)
    elements, element = np.unique(rows.element, return_inverse=True)
    place = element * len(phases) + phase
    writer = np.full(len(elements) * len(phases), -1, np.int64)
    writes = np.flatnonzero(rows.writes)
    writer[place[writes]] = rows.lane[writes]
    conflict = (writer[place] != -1) & (writer[place] != rows.lane)
    if conflict.any():
        rows = rows[np.flatnonzero(np.isin(place, place[conflict]))]
        for group in _groups(rows):
            report.within_cta(group)


def _groups(rows: Touches) -> list[Touches]:
    """The accesses to one element between two barriers, by time; without those that only store one same value."""
    order = np.lexsort((rows.entry, rows.epoch, rows.cta, rows.element))
    rows = rows[order]
    changes = (np.diff(x) != 0 for x in (rows.element, rows.cta, rows.epoch))
    begins = np.flatnonzero(np.append(True, np.logical_or.reduce(list(changes))))
    harmless = rows.writes & ~rows.atomic
    only_stores = np.logical_and.reduceat(harmless, begins)
    same = np.minimum.reduceat(rows.value, begins) == np.maximum.reduceat(rows.value, begins)
    only_atomic = np.logical_and.reduceat(rows.atomic, begins)
    ends = np.append(begins[1:], len(rows))
    open_groups = np.flatnonzero(~((only_stores & same) | only_atomic))
    return [rows[begins[n] : ends[n]] for n in open_groups]


class _Reporter:
    """Turns accesses that race into a fault."""

    def __init__(self, record: Record, log: list[Access], rows: Touches, describe: Callable[[int], str], partial: list):
        self.record, self.log, self.rows, self.describe, self.partial = record, log, rows, describe, partial

    def between_ctas(self, rows: np.ndarray, bad: np.ndarray) -> None:
        if not bad.any():
            return
        first = int(rows[bad.argmax()])
        element = int(self.rows.element[first])
        others = np.flatnonzero((self.rows.element == element) & (self.rows.cta != self.rows.cta[first]))
        text = f"race between CTAs on {self._name(element)}: {self._does(self.rows, first)}"
        other = self._does(self.rows, others[0]) if len(others) else "another CTA touched it earlier"
        raise Fault(f"{text}; {other}; nothing orders CTAs")

    def within_cta(self, group: Touches) -> None:
        """Looks for two accesses of one element, between two barriers, that nothing orders."""
        if self._only_own_value(group):
            return
        for later in range(len(group)):
            for earlier in range(later):
                if self._conflict(group, earlier, later) and not self._ordered(group, earlier, later):
                    both = f"{self._does(group, earlier)}; {self._does(group, later)}"
                    differ = group.writes[earlier] and group.writes[later]
                    what = "two threads store different values" if differ else "race"
                    raise Fault(f"{what} on {self._name(int(group.element[0]))}: {both}; no barrier lies between")

    @staticmethod
    def _only_own_value(group: Touches) -> bool:
        """Whether all stores write one value, and every thread that reads has stored it before."""
        if group.atomic.any():
            return False
        values = group.value[group.writes]
        firsts = {}
        for lane, writes in zip(group.lane, group.writes, strict=True):
            firsts.setdefault(lane, writes)
        return bool((values == values[0]).all() and all(firsts.values()))

    @staticmethod
    def _conflict(group: Touches, a: int, b: int) -> bool:
        if group.lane[a] == group.lane[b] or not (group.writes[a] or group.writes[b]):
            return False
        if group.atomic[a] and group.atomic[b]:
            return False
        both_store = group.writes[a] and group.writes[b] and not (group.atomic[a] or group.atomic[b])
        return not (both_store and group.value[a] == group.value[b])

    def _ordered(self, group: Touches, a: int, b: int) -> bool:
        """Whether the warp of both threads met, in whole or with both of them, between the two accesses."""
        warp = group.lane[a] // 32
        if group.lane[b] // 32 != warp:
            return False
        if group.warp_epoch[a] != group.warp_epoch[b]:
            return True
        both = (1 << int(group.lane[a] % 32)) | (1 << int(group.lane[b] % 32))
        between = self.partial[self.log[group.entry[a]].synchronised : self.log[group.entry[b]].synchronised]
        return any(of == warp and lanes & both == both for of, lanes in between)

    def _name(self, element: int) -> str:
        region = self.record.region
        return f"{region.name}, element {element} of {self.record.element} bytes"

    def _does(self, rows: Touches, n: int) -> str:
        access = self.log[rows.entry[n]]
        verb = {"load": "reads", "store": "writes", "atomic": "changes"}[access.kind]
        return f"{self.describe(int(rows.lane[n]))} {verb} it ({access.instruction.where})"
