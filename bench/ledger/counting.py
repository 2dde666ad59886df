"""The ledger: every operation and kernel of a call, in order, and the memory that is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench.fake_cuda import FakeCuda
from bench.ledger.cases import Call
from bench.ledger.operations import Work, tensors_in, work_of
from patchkernels.kernels.traffic import TRAFFIC


class Rates(NamedTuple):
    """What a GPU sustains."""

    gpu: str
    tflops: float  # of a bf16 product with fp32 sums
    terabytes: float  # a second, to and from memory


class Entry(NamedTuple):
    """An operation or a kernel."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # of its tensors
    work: Work
    held: int  # bytes that are allocated when it has run

    def seconds(self, rates: Rates) -> float:
        return seconds_of(self.work, rates)


def seconds_of(work: Work, rates: Rates) -> float:
    """The longer of the times for its bytes and for its FLOPs."""
    return max((work.read + work.written) / (rates.terabytes * 1e12), work.flops / (rates.tflops * 1e12))


@dataclass
class Ledger:
    """Observes a :class:`FakeCuda`."""

    entries: list[Entry] = field(default_factory=list)
    knows_memory: bool = True  # but for generated kernels, whose results are not made
    _storages: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def operation(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        for tensor in tensors_in(result):
            self.hold(tensor)
        work = work_of(func, args, kwargs, result)
        if work is not None:
            name = func.name().removeprefix("aten::").split(".")[0]
            self.knows_memory &= name != "ledger::generated"
            self._enter(args[1] if name == "ledger::generated" else name, (args, kwargs, result), work)

    def launch(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        traffic = TRAFFIC[kernel](grid, arguments)
        self._enter(kernel, arguments, Work(traffic.read, traffic.written))

    def hold(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor for as long as something refers to it."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def storages(self) -> dict[int, int]:
        """The bytes of all memory that still belongs to a tensor."""
        self._storages = {key: found for key, found in self._storages.items() if not found[0].expired()}
        return {key: size for key, (_, size) in self._storages.items()}

    def held(self) -> int:
        return sum(self.storages().values())

    def _enter(self, name: str, tensors: Any, work: Work) -> None:
        shapes = tuple(dict.fromkeys(tuple(t.shape) for t in tensors_in(tensors)))
        self.entries.append(Entry(name, shapes, work, self.held()))


class Count(NamedTuple):
    """What one pass of a contender does."""

    contender: str
    name: str
    entries: list[Entry]
    extra: int | None  # bytes that are held at most beyond inputs and results; None if that is not known

    def seconds(self, rates: Rates) -> float:
        return sum(entry.seconds(rates) for entry in self.entries)

    def total(self) -> Work:
        return Work(*map(sum, zip(*(entry.work for entry in self.entries))))


def count(make: Callable[[], Call], contender: str) -> list[Count]:
    """Runs a call on a GPU without data; one count for each of its passes."""
    ledger, counts = Ledger(), []
    with FakeCuda(ledger) as gpu:
        call = make()  # kept to the end, since the inputs hold the gradients
        passes = call(gpu.backward)
        name = next(passes)
        while name:
            ledger.entries.clear()
            before = ledger.storages()
            following = next(passes, "")
            results = sum(size for key, size in ledger.storages().items() if key not in before)
            peak = max(entry.held for entry in ledger.entries)
            extra = max(peak - sum(before.values()) - results, 0)
            counts.append(Count(contender, name, list(ledger.entries), extra if ledger.knows_memory else None))
            name = following
    return counts
