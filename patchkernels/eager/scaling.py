"""Products of a tensor and a number that is known on the device alone."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(
    values: Tensor,
    scale: Tensor,  # (), fp32 (fp64 for fp64)
    dtype: torch.dtype,
) -> Tensor:
    """``values * scale``, taken in the dtype of ``scale`` and rounded once to ``dtype``; new memory."""
    return (values.to(scale.dtype) * scale).to(dtype)


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """``values *= scale``, taken in the dtype of ``scale``."""
    return values.mul_(scale) if values.dtype == scale.dtype else values.copy_(values.to(scale.dtype) * scale)
