"""Products of a tensor and a number that is known on the device alone."""

from __future__ import annotations

from torch import Tensor


def scale_into(
    out: Tensor,
    values: Tensor,
    scale: Tensor,  # (), fp32 (fp64 for fp64)
) -> Tensor:
    """``out = values * scale``, taken in the dtype of ``scale`` and rounded once."""
    return out.copy_(values.to(scale.dtype) * scale)


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """``values *= scale``, taken in the dtype of ``scale``."""
    return values.mul_(scale) if values.dtype == scale.dtype else values.copy_(values.to(scale.dtype) * scale)
