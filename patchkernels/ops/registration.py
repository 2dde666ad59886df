"""How the operators are registered with PyTorch, so that ``torch.compile`` takes each as one node of its graph.

This is ``torch.library.custom_op`` without what the operators do not need: their derivatives are those of the
``autograd.Function`` that calls them. A call costs a few microseconds instead of some tens. A call by itself has no
derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

Body = TypeVar("Body", bound=Callable[..., Any])

NAMESPACE = "patchkernels"
BODIES: dict[str, Callable[..., Any]] = {}  # of every operator, by its qualified name

_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
_library = torch.library.Library(NAMESPACE, "DEF")


def operator(schema: str) -> Callable[[Body], Body]:
    """Makes the function under it ``torch.ops.patchkernels.<name>``, on every device.

    A call of the function goes to that operator where something looks on (:func:`_is_watched`), and else to the body.
    ``schema`` begins with the name. If the first argument is changed in place, it is a ``Tensor(a!)``.
    """

    name = schema[: schema.index("(")]
    qualified, in_place = f"{NAMESPACE}::{name}", "(a!)" in schema

    def run(*arguments: Any) -> Any:
        body = BODIES[qualified]
        if torch.is_grad_enabled():
            with torch.no_grad():
                results = body(*arguments)
        else:
            results = body(*arguments)
        if in_place:
            torch.autograd.graph.increment_version(arguments[0])
        return results

    def register(body: Body) -> Body:
        if qualified not in BODIES:  # else its module is being reloaded
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(name, run, "CompositeExplicitAutograd")
        BODIES[qualified] = body
        registered = getattr(torch.ops.patchkernels, name)
        types = [str(argument.type) for argument in registered.default._schema.arguments]
        floats = [place for place, kind in enumerate(types) if kind in ("float", "Optional[float]")]

        def call(*arguments: Any) -> Any:
            if _is_watched(arguments):
                return registered(*arguments)
            given = list(arguments)
            for place in floats:  # as the dispatcher would; kernels are compiled anew for integers
                if given[place] is not None:
                    given[place] = float(given[place])
            return run(*given)

        return cast(Body, functools.wraps(body)(call))

    return register


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether something needs the operator as one node: a compiler, a tracer, a profiler, a mode or a transform.

    Tensors without plain data need it too (on the meta device, zero or negated by a flag), and subclasses of tensors,
    which may have a rule of their own for it. Elsewhere PyTorch's dispatcher has nothing to choose, and takes ten
    microseconds. Of profilers, ``torch.profiler`` is noticed, but not an ``ExecutionTraceObserver`` by itself.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # of torch.jit.trace
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)  # autograd's is_grads_batched
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return True
    return not all(_is_plain(a) for a in arguments if isinstance(a, Tensor))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and not (tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor())


def fake(*names: str) -> Callable[[Body], Body]:
    """Makes the function under it give the shapes and dtypes of the results of these operators, without data."""

    def register(function: Body) -> Body:
        for name in names:
            torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library, allow_override=True)
        return function

    return register
