"""Everything that is asserted of a case, and a failing case made smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soak import bad_input
from soak.cases import SLOW_KERNELS, BadInputCase, EmbeddingCase, TargetsCase
from soak.comparison import Margin, margins, results
from soak.problems import Outputs, Problem, block_sizes, problem
from soak.tensors import DEVICE, storage_bytes

MOST_ATTEMPTS = 200  # to make a failing case smaller


def check(case: Any) -> dict[str, Margin]:
    """Asserts all that holds for a case; returns how its results compare with their bounds."""
    if isinstance(case, BadInputCase):
        bad_input.check(case)
        return {}
    with block_sizes(case):
        ours = problem(case)
        tensors = (*ours.leaves.values(), *ours.constants.values())
        before = [storage_bytes(tensor) for tensor in tensors]
        found = results(case, ours.leaves, ours.ours, repeat=True)
        one_thread = case.backend == "triton" and SLOW_KERNELS  # kernels on a CPU run in a fixed order
        again = found if one_thread else results(case, ours.leaves, ours.ours)
    unchanged = (torch.equal(bits, storage_bytes(tensor)) for bits, tensor in zip(before, tensors, strict=True))
    assert all(unchanged), "an input was changed"
    _check_repetitions(found, again)
    _check_dtypes(ours, found)
    if isinstance(case, TargetsCase):
        assert torch.equal(found["targets"], ours.plain()["targets"]), "the targets are wrong"
        return {}
    if isinstance(case, EmbeddingCase) and case.patch_size == 1:
        looked_up = F.embedding(ours.constants["input_ids"], ours.leaves["weight"])
        assert _same_bits(found["embedding"], looked_up), "at K = 1 this is F.embedding, bit for bit"
    compared = margins(ours, case, found)
    too_far = [
        f"the error of the {name} is {margin.of_allowed:.3g} times what is allowed"
        for name, margin in compared.items()
        if not margin.of_allowed <= 1
    ]
    assert not too_far, "; ".join(too_far)
    return compared


def _check_repetitions(found: Outputs, again: Outputs) -> None:
    for name, value in again.items():
        assert _same_bits(value, found[name]), f"two calls differ in the {name}"
    for name, value in found.items():
        assert _same_bits(value, found[name.removeprefix("second ")]), f"the {name} differs from the first"


def _check_dtypes(ours: Problem, found: Outputs) -> None:
    for name, value in found.items():
        leaf = ours.leaves.get(name.rpartition(" ")[2])
        dtype = ours.out_dtypes[name] if leaf is None else leaf.dtype
        assert value.dtype == dtype, f"the {name} must be {dtype}, is {value.dtype}"
        assert value.device.type == DEVICE, f"the {name} is on {value.device}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(storage_bytes(a.clone()), storage_bytes(b.clone()))


def smaller(case: Any, failed: Exception) -> Any:
    """The case with as many fields as possible at their defaults, and small dimensions, that still fails alike."""
    attempts = 0
    progress = True
    while progress:
        progress = False
        for candidate in _candidates(case):
            attempts += 1
            if attempts > MOST_ATTEMPTS:
                return case
            if _kind(candidate) == _kind_of(failed):
                case, progress = candidate, True
                break
    return case


def _candidates(case: Any) -> Iterator[Any]:
    if isinstance(case, BadInputCase):
        yield from (dataclasses.replace(case, good=good) for good in _candidates(case.good))
        return
    for field in dataclasses.fields(case):
        value, default = getattr(case, field.name), field.default
        simpler = [default]
        if type(value) is type(default) is int:
            simpler = [default, value // 2, value - 1] if value > default else []
        if isinstance(value, tuple):
            simpler = [value[:i] + value[i + 1 :] for i in range(len(value))]
            simpler += [(*value[:i], value[i] - 1, *value[i + 1 :]) for i in range(len(value)) if _above_one(value[i])]
        for other in simpler:
            if other != value and field.name not in ("seed", "backend"):
                yield dataclasses.replace(case, **{field.name: other})


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _kind(case: Any) -> tuple[Any, ...] | None:
    try:
        check(case)
    except Exception as error:
        return _kind_of(error)
    return None


def _kind_of(error: Exception) -> tuple[Any, ...]:
    """What is the same of a failure in a smaller case: its type and the first words of its message."""
    return type(error), str(error).split()[:3]
