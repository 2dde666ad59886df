"""Results and gradients of a case, and how far they may be from exact.

The error of a tensor is measured row by row, as the largest difference from the exact row. Allowed is twice the largest
error of these:

    plain PyTorch in the same dtype,
    exact arithmetic with simulated rounding, many times (plain PyTorch may be exact by luck),

and one rounding of each element to its dtype; where a gradient is computed before its scale is known, one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton_on_cpu
from torch import Tensor

from soak.exact import EXACT, Arithmetic
from soak.problems import Outputs, Problem
from soak.tensors import DEVICE, generator

FACTOR = 2
# Simulated roundings: a few for every case, and more before it is said to fail.
FEW, MANY = 2, 100


class Margin(NamedTuple):
    """The error of a result, divided by two others."""

    of_allowed: float  # by what is allowed, in the worst row
    of_plain: float  # by plain PyTorch's; 0 where that is within the rounding of the result


def results(case: Any, leaves: dict[str, Tensor], function: Any, *, repeat: bool = False) -> Outputs:
    """The outputs and gradients of a function of the leaves; with ``repeat`` of a second backward also."""
    needs = [name for name in case.needs if name in leaves and not case.no_grad]
    leaves = {name: leaf.detach().requires_grad_(name in needs) for name, leaf in leaves.items()}
    with torch.set_grad_enabled(not case.no_grad):
        outputs: Outputs = function(**leaves)
    result = next(iter(outputs.values()))
    found = {name: output.detach() for name, output in outputs.items()}
    assert result.requires_grad == bool(needs), f"requires_grad is {result.requires_grad}, with gradients of {needs}"
    if needs:
        upstream = _upstream(case, result)
        wanted = [leaves[name] for name in needs]
        for name in ("gradient", "second gradient")[: 1 + repeat]:
            gradients = torch.autograd.grad(result, wanted, upstream.to(result), retain_graph=repeat)
            found |= {f"{name} of {leaf}": gradient for leaf, gradient in zip(needs, gradients)}
    return found


def _upstream(case: Any, result: Tensor) -> Tensor:
    random = generator(case.seed + 1)
    value = torch.randn(result.shape, generator=random, dtype=torch.float64)
    scale = 10 ** (8 * torch.rand((), generator=random, dtype=torch.float64) - 4)
    kinds = {"one": torch.ones_like(value), "zero": torch.zeros_like(value), "tensor": value + 2}
    value = kinds.get(case.upstream, torch.ones_like(value) * scale)
    return value.float().double()  # exact in fp32, the dtype of a loss


def units(problem: Problem, case: Any) -> tuple[float, float]:
    """The largest relative error of a rounding to the dtype of the tensors, and to that of sums."""
    # Triton's interpreter truncates bf16 where a GPU rounds to the nearest.
    truncates = case.backend == "triton" and DEVICE == "cpu" and not triton_on_cpu.ARCHITECTURE
    stored = torch.finfo(problem.dtype).eps / (1 if truncates and problem.dtype == torch.bfloat16 else 2)
    summed = torch.finfo(torch.float64 if problem.dtype == torch.float64 else torch.float32).eps / 2
    return stored, summed


def tanh_error(case: Any, dtype: torch.dtype) -> float:
    """What the operators say of the soft cap's ``tanh`` for 16-bit logits with Triton; elsewhere it is rounded once."""
    return 1e-6 if case.backend == "triton" and torch.finfo(dtype).bits == 16 else 0.0


def margins(problem: Problem, case: Any, ours: Outputs) -> dict[str, Margin]:
    """For each of our results how its error compares with the allowed one; above 1 it fails."""
    stored, summed = units(problem, case)
    smallest = torch.finfo(problem.dtype).smallest_normal
    # fp64 leaves, of the values that the operator sees after autocast
    leaves = {name: leaf.to(problem.dtype).double().cpu() for name, leaf in problem.leaves.items()}

    def simulated(arithmetic: Arithmetic) -> Outputs:
        return results(case, leaves, lambda **leaves: problem.exact(**leaves, arithmetic=arithmetic))

    def samples(begin: int, end: int) -> Iterator[Outputs]:
        for i in range(begin, end):
            # Errors of equal rows add up if they are alike, and those of opposite rows if they are not.
            alike, tanh = i % 2 == 0, tanh_error(case, problem.dtype)
            yield simulated(Arithmetic(stored, smallest, summed, generator(case.seed + i), alike, tanh))

    expected = simulated(EXACT)
    plain = results(case, problem.leaves, problem.plain)
    allowed = {name: _error(plain[name], expected[name]) for name in expected}
    found = {}
    for begin, end in ((0, FEW), (FEW, MANY)):
        for sample in samples(begin, end):
            allowed = {name: torch.maximum(allowed[name], _error(sample[name], expected[name])) for name in expected}
        unit = {name: stored if "gradient" in name else _unit(ours[name], stored) for name in expected}
        found = {name: _margin(ours[name], plain[name], expected[name], allowed[name], unit[name]) for name in expected}
        if all(margin.of_allowed <= 1 for margin in found.values()):
            break
    return found


def _unit(tensor: Tensor, stored: float) -> float:
    return stored if tensor.element_size() == 2 else torch.finfo(tensor.dtype).eps / 2


def _error(value: Tensor, expected: Tensor) -> Tensor:  # (rows)
    """The largest error of each row; infinite where a value is not finite and should be, as happens in fp16."""
    difference = (_rows(value) - _rows(expected)).abs()
    same = torch.eq(_rows(value), _rows(expected)) | (_rows(value).isnan() & _rows(expected).isnan())
    difference = torch.where(same, 0, difference.nan_to_num(torch.inf))
    return difference.amax(1) if difference.numel() else difference.new_zeros(len(difference))


def _margin(ours: Tensor, plain: Tensor, expected: Tensor, allowed: Tensor, unit: float) -> Margin:
    magnitude = _rows(expected).abs().nan_to_num(0, 0, 0)
    magnitude = magnitude.amax(1) if magnitude.numel() else magnitude.new_zeros(len(magnitude))
    # a gradient is rounded before and after its scale, and values below the normal range lose digits
    rounding = 2 * unit * magnitude + torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    error, plain_error = _error(ours, expected), _error(plain, expected)
    largest = [t.max() if len(t) else t.sum() for t in (error, plain_error, rounding)]
    by_luck = largest[1] <= largest[2]
    return Margin(_ratio(error, FACTOR * allowed + rounding), 0.0 if by_luck else float(largest[0] / largest[1]))


def _ratio(error: Tensor, allowed: Tensor) -> float:
    if not len(error):
        return 0.0
    ratio = torch.where((error == 0) | (allowed == torch.inf), 0, error / allowed)
    return float(ratio.max())


def _rows(tensor: Tensor) -> Tensor:  # (rows, columns)
    tensor = tensor.detach().double().cpu()
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 and tensor.shape[-1] else 1)
