"""The table that patch embedding and the head share, on its way from one to the other and back.

In the backward the head's gradient arrives first. The embeddings' gradients may be added to it in its memory if nobody
else has it. So it is known: the head got the table itself, not a sum with something else, and its gradient is new.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkernels.ops.derivatives import transforms

TIED, OWNED = "_patchkernels_tied", "_patchkernels_owned"  # attributes of tensors


def mark_tied(weight: Tensor) -> Tensor:
    """Marks the table that an embedding returns for its head."""
    if not torch.compiler.is_compiling():
        setattr(weight, TIED, True)
    return weight


def is_tied(weight: Tensor) -> bool:
    """Whether this is a table that an embedding returned. Compiled code does not ask: there it makes no difference."""
    return not torch.compiler.is_compiling() and hasattr(weight, TIED)


def mark_owned(gradient: Tensor) -> None:
    """Marks a gradient that a head has just made for a tied table."""
    setattr(gradient, OWNED, True)


def is_owned(gradient: Tensor) -> bool:
    """Whether nobody else has this gradient: a head made it for the table alone, and it is the only head."""
    return hasattr(gradient, OWNED) and gradient.is_contiguous() and not gradient.requires_grad and not transforms()
