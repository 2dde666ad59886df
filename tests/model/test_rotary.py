"""Rotary positions against their definition as complex numbers in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchkernels.model.rotary import rotary_table, rotate

THETA = 100.0


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """The definition: the halves of a head are the real and the imaginary parts of numbers on which it acts."""
    half = x.shape[-1] // 2
    angle = position.double()[..., None, None] * THETA ** (-torch.arange(half).double() / half)
    turned = torch.complex(x.double()[..., :half], x.double()[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 7, 7], [2, 2, 2, 2, 2, 2, 3]])])
def test_values(dtype, documents):
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64).to(dtype)
    position = torch.arange(7).expand(2, 7)
    if documents is not None:
        position = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]])
    out = rotate(x, rotary_table(x, documents, 10, THETA))
    assert out.dtype == dtype
    error = (out.double() - rotated(x, position)).abs()
    rounding_once = torch.finfo(dtype).eps / 2 * rotated(x, position).abs()
    assert (error <= rounding_once + 4e-6).all(), "the table itself must not be rounded to 16 bits"


def test_the_table_is_one_node():
    torch.library.opcheck(torch.ops.patchkernels.rotary_table, (torch.arange(7)[None], 10, THETA))
    names = []

    def keep(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(1, 7, 3, 10)
    torch.compile(lambda x: rotate(x, rotary_table(x, None, 10, THETA)), backend=_aot(keep), fullgraph=True)(x)
    assert "patchkernels.rotary_table.default" in names and not any("cos" in name for name in names)


def _aot(compiler):
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=compiler)
