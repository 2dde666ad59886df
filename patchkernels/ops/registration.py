"""How the operators are registered with PyTorch, so that ``torch.compile`` takes each as one node of its graph.

This is ``torch.library.custom_op`` without what the operators do not need: their derivatives are those of the
``autograd.Function`` that calls them. A call costs a few microseconds instead of some tens. A call by itself has no
derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Body = TypeVar("Body", bound=Callable[..., Any])

NAMESPACE = "patchkernels"
BODIES: dict[str, Callable[..., Any]] = {}  # of every operator, by its qualified name

_library = torch.library.Library(NAMESPACE, "DEF")


def operator(schema: str) -> Callable[[Body], Body]:
    """Makes the function under it ``torch.ops.patchkernels.<name>``, on every device.

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
        return body

    return register


def fake(*names: str) -> Callable[[Body], Body]:
    """Makes the function under it give the shapes and dtypes of the results of these operators, without data."""

    def register(function: Body) -> Body:
        for name in names:
            torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library, allow_override=True)
        return function

    return register
