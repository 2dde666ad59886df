"""Products of a tensor and a number that is known on the device alone."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_into(
    out: Tensor,
    values: Tensor,
    scale: Tensor,  # (), fp32 (fp64 for fp64)
) -> Tensor:
    """``out = values * scale``, taken in the dtype of ``scale`` and rounded once."""
    if values.device.type == "cpu" and out.dtype == values.dtype:
        return torch.mul(values, scale.item(), out=out)
    return out.copy_(values.to(scale.dtype) * scale)


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """``values *= scale``, taken in the dtype of ``scale``. On a CPU the number can be read, and 1 costs nothing."""
    if values.device.type == "cpu":
        number = scale.item()
        return values if number == 1 else values.mul_(number)
    return values.mul_(scale) if values.dtype == scale.dtype else values.copy_(values.to(scale.dtype) * scale)
