"""Finds out what a model does to the output of its head before its loss function receives it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchkernels.hf.class_swap import SwappedClass, restore_class, swap_class
from patchkernels.hf.modules import LogitMap

TOLERANCE = 1e-4  # relative, of logits in fp32


class LossCall(NamedTuple):
    """One call of a model's loss function."""

    logits: Tensor
    labels: Tensor
    loss: Tensor


@dataclass
class LossCalls:
    """The calls of a model's loss function, and what it returns in place of its own loss, if anything."""

    replacement: Callable[[Tensor], Tensor] | None
    calls: list[LossCall] = field(default_factory=list)


class LossRecorderMixin(SwappedClass):
    """Records the calls of a model's loss function."""

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        original: Callable[..., Tensor] = super().loss_function  # type: ignore[misc]
        state: LossCalls = self._patch_state

        def record(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if state.replacement is None:
                loss = original(logits, labels, *args, **kwargs)
            else:
                loss = state.replacement(logits)
            state.calls.append(LossCall(logits, labels, loss.clone()))  # models add losses to it in place
            return loss

        return record


@contextlib.contextmanager
def recorded_loss(model: Any, replacement: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[LossCall]]:
    """The calls of the model's loss function in this block, with another function of the logits in place of it."""
    state = LossCalls(replacement)
    swap_class(model, LossRecorderMixin, state)
    try:
        yield state.calls
    finally:
        restore_class(model)


class LossReached(Exception):
    """Ends a run of a model where it calls its loss function."""


def end_run(logits: Tensor) -> Tensor:
    raise LossReached(logits)


def find_logit_map(model: Any, ids: Tensor) -> LogitMap | None:
    """The :class:`LogitMap` between the output of the model's head and its loss function; None if there is another.

    Runs the model once, up to its loss function. A hook replaces the output of the head, an ``nn.Linear``, by known
    numbers, and what the loss function receives is compared with them.
    """
    head = model.get_output_embeddings()
    generator = torch.Generator("cpu").manual_seed(0)
    # The rows are of very different sizes, so that clamps and soft caps are seen, and no row has the mean 0.
    sizes = torch.logspace(-1, 3, ids.numel(), device="cpu").view(*ids.shape, 1)
    z = torch.randn(*ids.shape, head.out_features, generator=generator, device="cpu").add_(0.5).mul_(sizes)
    z = z.to(ids.device)
    hook = head.register_forward_hook(lambda module, args, output: z)
    try:
        with recorded_loss(model, end_run), torch.no_grad():
            model(input_ids=ids, labels=ids)
        return None
    except LossReached as reached:
        logits = reached.args[0].double()
    except Exception:  # the loss may still be exact if it is computed from the model's logits
        return None
    finally:
        hook.remove()
    z = z.double()
    if logits.shape != z.shape:
        return None
    for scale in (1.0, float((logits * z).sum() / (z * z).sum())):
        if is_close(logits, scale * z):
            return LogitMap(scale)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap and is_close(logits, softcap * torch.tanh(z / softcap)):
        return LogitMap(1.0, float(softcap))
    return None


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether every row (..., V) agrees with the other, relative to the largest number of the row."""
    error, size = ((found - expected).abs().amax(-1), expected.abs().amax(-1))
    return bool((error <= TOLERANCE * size).all())


def find_logit_map_at_full_size(model: Any, small: Any, ids: Tensor) -> LogitMap | None:
    """The :class:`LogitMap` of a model that is tried by means of a small one.

    A width may be a factor of the logits, so the map of the small model need not be that of the large one. What makes
    logits of the head's output is taken to be the code of the modules that contain the head: these run with the
    configuration and the numbers of the large model, on the modules of the small one. If another module runs between
    the head and the loss function, the result is None.
    """
    head = small.get_output_embeddings()
    path = next(name for name, module in small.named_modules() if module is head).split(".")
    if not all(buffer.numel() == 1 and buffer.device.type != "meta" for buffer in buffers_on_path(model, path)):
        return None
    called: list[Any] = []
    hooks = [module.register_forward_pre_hook(lambda module, args: called.append(module)) for module in small.modules()]
    try:
        logit_map = find_logit_map(with_settings_of(model, small, path), ids)
    finally:
        for hook in hooks:
            hook.remove()
    return logit_map if called and called[-1] is head else None


def buffers_on_path(model: Any, path: list[str]) -> Iterator[Tensor]:
    """The buffers of floating-point numbers of a model and of the modules on the path from there to its head."""
    for name in path:
        yield from (buffer for buffer in model._buffers.values() if buffer is not None and buffer.is_floating_point())
        model = getattr(model, name)


def with_settings_of(model: Any, small: Any, path: list[str]) -> Any:
    """A module with the inner modules of ``small``, and with the configuration, numbers and buffers of ``model``.

    So are the modules on the path from there to the head.
    """
    module = object.__new__(type(small))
    numbers = {name: value for name, value in vars(model).items() if isinstance(value, int | float)}
    buffers = {name: buffer.to(small.device) for name, buffer in model._buffers.items() if buffer is not None}
    vars(module).update({**vars(small), **numbers, "_buffers": buffers, "training": False})
    if hasattr(model, "config"):
        vars(module)["config"] = model.config
    if len(path) > 1:
        inner = with_settings_of(getattr(model, path[0]), getattr(small, path[0]), path[1:])
        vars(module)["_modules"] = {**small._modules, path[0]: inner}
    return module
