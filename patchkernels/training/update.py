"""The update of a training step: the norm of the gradient, clipping, and the optimizers' steps.

g <- g min(1, clip / (|g| + 1e-6));     no step if |g| is not finite
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from patchkernels.training.processes import full_tensor

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def update(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], clip: float) -> Tensor:
    """Updates ``parameters``, and returns the norm of their gradient: a scalar on their device.

    Optimizers that divide by a scale and skip a step themselves (those of torch with ``fused=True``) do both within
    their one pass, and the host does not wait for the GPU. For others it waits for the norm.
    """
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers):
        scale, is_bad = ((norm + EPSILON) / clip).clamp(min=1), (~norm.isfinite()).float()
        for optimizer in optimizers:
            with scaled(optimizer, scale, is_bad):
                optimizer.step()
    elif math.isfinite(norm.item()):
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        for optimizer in optimizers:
            optimizer.step()
    return norm


@contextlib.contextmanager
def scaled(optimizer: torch.optim.Optimizer, scale: Tensor, is_bad: Tensor) -> Iterator[None]:
    """Within the block the optimizer divides gradients by ``scale``, and takes no step if ``is_bad`` is 1.

    These are the attributes by which ``torch.amp.GradScaler`` tells it so.
    """
    optimizer.grad_scale, optimizer.found_inf = scale, is_bad  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
