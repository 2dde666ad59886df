"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the layout of Hugging Face's LLaMA.

out[i]          = x[i] cos(a_i) - x[i + hd/2] sin(a_i)        a_i = position * theta^(-2i / hd),  i < hd/2
out[i + hd/2]   = x[i + hd/2] cos(a_i) + x[i] sin(a_i)
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkernels.model.attention import document_positions
from patchkernels.ops.registration import fake, operator


def rotary_table(
    x: Tensor,  # (B, P, ...)
    document_ids: Tensor | None,  # (B, P)
    head_size: int,
    theta: float,
) -> tuple[Tensor, Tensor]:
    """The factors of :func:`rotate`: cosines, and sines that are negative in the first half of a head.

    Each is ``(B or 1, P, 1, hd)``, in fp32, or fp64 if ``x`` has fp64. Positions restart with every document.
    """
    position = (
        torch.arange(x.shape[1], device=x.device)[None] if document_ids is None else document_positions(document_ids)
    )
    cos, signed_sin = _cos_and_signed_sin(position, head_size, theta)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return cos.to(dtype), signed_sin.to(dtype)


@operator("rotary_table(Tensor position, SymInt head_size, float theta) -> (Tensor, Tensor)")
def _cos_and_signed_sin(position: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """An operator, so that compiled code computes the table once a step, and not in every kernel that reads it."""
    exponent = torch.arange(0, head_size, 2, device=position.device).float() / head_size
    angle = position[..., None].float() * (1.0 / theta**exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).unsqueeze_(-2), torch.cat([-sin, sin], -1).unsqueeze_(-2)


@fake("rotary_table")
def _(position: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    shape = (*position.shape, 1, head_size)
    return position.new_empty(shape, dtype=torch.float32), position.new_empty(shape, dtype=torch.float32)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # (B, P, H, hd)
    """``x`` with every head turned by its position, computed in the dtype of the table and rounded once."""
    cos, signed_sin = rotary
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([second, first], -1) * signed_sin).to(x.dtype)
