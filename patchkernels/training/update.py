"""The update of a training step: the norm of the gradient, clipping, and the optimizers' steps.

g <- g min(1, clip / (|g| + 1e-6));     no step if |g| or the loss is not finite
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from patchkernels.training.processes import full_tensor

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def update(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], clip: float, loss: Tensor
) -> Tensor:
    """Updates ``parameters``, and returns the norm of their gradient: a scalar on their device.

    Fused Adam and AdamW clip and skip within their one pass, and the host does not wait for the GPU. For other
    optimizers, and for those with hooks, which see the clipped gradient, it waits for the norm.

    Args:
        loss: a scalar, the same in all processes.
    """
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    finite = norm.isfinite() & loss.isfinite()
    if all(scales_and_skips(optimizer) for optimizer in optimizers):
        largest = torch.finfo(torch.float32).max
        scale = ((norm.double() + EPSILON) / clip).clamp(min=1, max=largest).float()
        for optimizer in optimizers:
            with scaled(optimizer, scale, (~finite).float()):
                optimizer.step()
    elif finite.item():
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        for optimizer in optimizers:
            optimizer.step()
    return norm


def scales_and_skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer is one pass that can scale gradients, and change nothing."""
    plain = not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
    fused = isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") for group in optimizer.param_groups)
    return plain and fused and not hasattr(optimizer, "grad_scale")


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
