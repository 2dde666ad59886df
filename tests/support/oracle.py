"""Shared by tests of the operators: the device, the backends with their dtypes, and the tolerance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND_DTYPES = [
    ("eager", torch.float64),
    ("eager", torch.float32),
    ("eager", torch.bfloat16),
    ("eager", torch.float16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
]


# The error that is always allowed, in units of eps. Plain PyTorch in the same dtype may happen to be exact, and fp64
# results have nothing more exact to compare with. 16-bit results are rounded once or twice, and Triton's interpreter
# truncates where a GPU rounds to nearest.
FLOOR = {torch.float64: 64, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """``|value - exact| / |exact|`` in the 2-norm; NaN where either holds one, so that every comparison fails."""
    value, exact = value.detach().double(), exact.detach().double()
    norm = exact.norm()
    return float((value - exact).norm() / norm) if norm > 0 else float(value.norm())


def assert_as_exact_as_plain(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Asserts an error against fp64 of at most twice that of plain PyTorch in the same dtype, or of the floor above."""
    assert ours.shape == exact.shape
    bound = max(2 * relative_error(plain, exact), FLOOR[ours.dtype] * torch.finfo(ours.dtype).eps)
    error = relative_error(ours, exact)
    if ours.dtype == torch.float64:  # a loss near 0 is a difference of numbers of order 1, so its error is absolute
        error *= min(1.0, float(exact.norm()) or 1.0)
    assert error <= bound, f"relative error {error:.3g} against {bound:.3g} allowed"


def outputs_and_gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 1) -> list[Tensor]:
    """The result, and the gradients of all floating-point inputs for a random upstream gradient."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 2
    wanted = [t for t in leaves if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out))]


def compare(ours: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Asserts that value and gradients of ``ours`` are as exact as those of ``reference`` in the same dtype."""
    exact = outputs_and_gradients(reference, *(t.double() if t.is_floating_point() else t for t in inputs))
    plain = outputs_and_gradients(reference, *inputs)
    for value, plain_value, exact_value in zip(outputs_and_gradients(ours, *inputs), plain, exact, strict=True):
        assert_as_exact_as_plain(value, plain_value, exact_value)
