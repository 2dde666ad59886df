"""FLOP formulas, registered when ``torch.utils.flop_counter`` is first imported: it imports Triton, which is slow."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"


class _AfterImport:
    """A finder that lets others find the module and acts once it has run."""

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


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """``formula`` counts ``operator`` under ``FlopCounterMode``, whichever of the two is imported first."""

    def register() -> None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(operator)(formula)

    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))
