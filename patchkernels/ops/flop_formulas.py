"""FLOP formulas of the fused losses for ``torch.utils.flop_counter.FlopCounterMode``: their matrix products.

``torch.utils.flop_counter`` imports Triton, which takes longer than importing this package. The formulas are therefore
registered by an import hook, when the counter is imported, or at once if it has been imported already.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"


def logits_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """``2 N V D``: the logits of ``x (N, D)`` and a head ``(V, D)``, given as shapes."""
    (rows, hidden), vocab = x, weight[0]
    return 2 * rows * vocab * hidden


def losses_flops(x: Any, weight: Any, bias: Any, target: Any, c: Any, needs: Sequence[bool], *_: Any, **__: Any) -> int:
    """``2 N V D`` for the logits and, if gradients are computed, as much for each of dx and dW."""
    need_dx, need_dw, _need_db = needs
    return logits_flops(x, weight) * (1 if c is None else 1 + need_dx + need_dw)


def loss_flops(
    x: Any, weight: Any, bias: Any, target: Any, target_weight: Any, reduction: str, every_loss: bool,
    needs: Sequence[bool], keep: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """``2 N V D`` for the logits, and as much for each of dx and dW if the backward does not compute them."""
    need_dx, need_dw, _need_db = needs
    return logits_flops(x, weight) * (1 if keep else 1 + need_dx + need_dw)


def gradients_flops(
    upstream: Any, scale: Any, dlogits: Any, dx: Any, dw: Any, db: Any, x: Any, weight: Any, needs: Sequence[bool],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """``2 N V D`` for each of dx and dW, if dlogits were kept for the backward."""
    need_dx, need_dw, _need_db = needs
    return 0 if x is None else logits_flops(x, weight) * (need_dx + need_dw)


def slices_backward_flops(
    c: Any, x: Any, weight: Any, bias: Any, target: Any, statistics: Any, needs: Sequence[bool], *_: Any, **__: Any
) -> int:
    """``2 N V D`` for the logits, which are computed again, and as much for each of dx and dW."""
    need_dx, need_dw, _need_db = needs
    return logits_flops(x, weight) * (1 + need_dx + need_dw)


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Makes ``FlopCounterMode`` count ``operator`` by ``formula``, whether it was imported before or will be later."""

    def register() -> None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(operator)(formula)

    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport:
    """An import hook that calls ``action`` once the counter has been imported. Other finders find the counter."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
