"""Triton kernel for the product of a tensor and a number that is known on the GPU alone.

In place it reads the number and returns if that is 1, as an upstream gradient usually is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NUM_WARPS = 8


def scale_into(
    out: Tensor,  # contiguous
    values: Tensor,
    scale: Tensor,  # (), fp32
) -> Tensor:
    """``out = values * scale``, taken in fp32 and rounded once."""
    _launch(values.contiguous(), scale, out)
    return out


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """``values *= scale``, taken in fp32. ``values`` is contiguous."""
    _launch(values, scale, values)
    return values


def _launch(values: Tensor, scale: Tensor, out: Tensor) -> None:
    elements = values.numel()
    if elements:
        with torch.cuda.device_of(values):  # Triton launches on the current device
            scale_kernel[(triton.cdiv(elements, BLOCK),)](
                values, scale, out, elements, IN_PLACE=out is values, BLOCK=BLOCK, num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit
def scale_kernel(values_ptr, scale_ptr, out_ptr, elements, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if not IN_PLACE or scale != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + offsets, mask=offsets < elements, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, (values * scale).to(out_ptr.dtype.element_ty), mask=offsets < elements)
