"""What can be derived from the operators: gradients, once. Asking for anything else raises an error that says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

Backward = Callable[..., tuple[Any, ...]]


def check_transforms(operator: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError for transforms of ``torch.func``, and for forward-mode tangents.

    Without ``torch.compile`` ``grad`` is allowed, of which ``vjp`` and ``jacrev`` are made. The compiler traces a
    backward in a transform with tensors of which it does not say that they require grad: gradients would be 0. If a
    compiled function may break its graph, it calls the operator outside of the graph instead.

    ``operator`` is named in the message. PyTorch's own message would name a private class.
    """
    if torch.compiler.is_compiling():
        if transforms():
            raise NotImplementedError(f"{operator} is not compiled in transforms of torch.func")
        return
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    vmap = "Vmap" in transforms()
    tangents = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if vmap or tangents:
        raise NotImplementedError(
            f"{operator} was called under {'torch.func.vmap' if vmap else 'forward-mode differentiation (jvp)'}. Of "
            "PyTorch's transforms the operators take torch.func.grad, vjp and jacrev, and leading dimensions take the "
            f"place of vmap. patchkernels.reference.{operator}, the same in plain PyTorch, takes all transforms"
        )


def transforms() -> tuple[str, ...]:
    """The transforms of ``torch.func`` in which the caller is, the outermost first: "Grad", "Vmap" or "Jvp"."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    names = (level.key().name for level in levels)
    return tuple(name for name in names if name != "Functionalize")


def is_mapped(tensor: Tensor) -> bool:
    """Whether a transform maps over the tensor: ``vmap``, or autograd's ``is_grads_batched``."""
    return "Batched" in str(torch._C._dispatch_keys(tensor))  # that of functorch is FuncTorchBatched


# torch.compile calls the function while it traces, and takes the result for a constant. This is all that
# torch.compiler.assume_constant_result does, but calling that here would import torch._dynamo, and with it much else.
transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Function(torch.autograd.Function):
    """An ``autograd.Function`` all of whose arguments are given in a call, by position.

    Torch's own ``apply`` binds them to the signature of the forward, which takes some microseconds. This one leaves
    that out, and calls torch's where compilers and transforms of ``torch.func`` look for it. Where no gradient is
    asked for, it is the forward alone.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)):
            return cls.forward(*arguments)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]


def first_derivative_only(backward: Backward) -> Backward:
    """The backward of an ``autograd.Function`` whose gradients raise RuntimeError when they are differentiated.

    ``torch.autograd.function.once_differentiable`` raises too, but only if the upstream gradient requires grad. Under
    ``create_graph=True`` with an ordinary upstream gradient its results are constants, so that a penalty on them would
    be left out of the training in silence. The gradients are therefore made to depend on a tensor that requires grad,
    and on the tensors that the forward has saved: autograd calls a backward only on the way to a tensor that it was
    asked for, and in ``torch.func.grad`` of another ``grad`` a tensor that requires grad does so for one of the two.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        saved = ctx.saved_tensors if create_graph else ()  # beforehand, since the backward may write to them
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not create_graph:
            return outputs
        anchors = (torch.empty((), requires_grad=True), *(t for t in (*grads, *saved) if t is not None))
        return tuple(_RaiseInBackward.apply(out, *anchors) if isinstance(out, Tensor) else out for out in outputs)

    return checked


class _RaiseInBackward(torch.autograd.Function):
    """The tensor itself, which requires grad because one of the anchors does."""

    generate_vmap_rule = True  # for torch.func.jacrev and is_grads_batched, which map the backward

    @staticmethod
    def forward(tensor: Tensor, *anchors: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass  # torch.func asks for this method

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("gradients of gradients are not defined: the operators are once_differentiable")
