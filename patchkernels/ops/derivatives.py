"""Gradients that cannot be differentiated once more: asking for that raises an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Any, ...]]


def first_derivative_only(backward: Backward) -> Backward:
    """The backward of an ``autograd.Function`` whose gradients raise RuntimeError when they are differentiated.

    ``torch.autograd.function.once_differentiable`` raises too, but only if the upstream gradient requires grad. Under
    ``create_graph=True`` with an ordinary upstream gradient its results are constants, so that a penalty on them would
    be left out of the training in silence.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # it is enabled by create_graph=True
            return outputs
        anchor = torch.empty((), requires_grad=True)
        return tuple(_RaiseInBackward.apply(out, anchor) if isinstance(out, Tensor) else out for out in outputs)

    return checked


class _RaiseInBackward(torch.autograd.Function):
    """The tensor itself, which requires grad because the anchor does."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("gradients of gradients are not defined: the operators are once_differentiable")
