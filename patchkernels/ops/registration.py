"""How the operators are registered with PyTorch, so that ``torch.compile`` takes each as one node of its graph.

This is ``torch.library.custom_op`` without what the operators do not need: their derivatives are those of the
``autograd.Function`` that calls them. A call costs a few microseconds instead of some tens.
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

    ``schema`` begins with the name. An argument that is changed in place is a ``Tensor(a!)`` in it.
    """

    def register(body: Body) -> Body:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(_name(schema), body, "CompositeExplicitAutograd")
        BODIES[f"{NAMESPACE}::{_name(schema)}"] = body
        return body

    return register


def fake(*names: str) -> Callable[[Body], Body]:
    """Makes the function under it give the shapes and dtypes of the results of these operators, without data."""

    def register(function: Body) -> Body:
        for name in names:
            torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library)
        return function

    return register


def _name(schema: str) -> str:
    return schema[: schema.index("(")]
