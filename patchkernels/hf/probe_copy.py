"""Makes the model on which patch steps are tried: a copy in fp32 with random weights, which may be small.

:func:`patchkernels.hf.enable` runs a model to find out which patch step of it is exact. It never runs the model that it
was given, but a copy, of which :func:`copy_to_try` chooses the kind:

- a copy of all weights, if the model has at most ``LARGEST_COPY`` parameters;
- else a model of the same class at a tiny size (:func:`patchkernels.hf.small_config.small_config`), provided that it is
  made of the same modules. So are models tried whose weights cannot be read: on the meta device, sharded, quantised;
- else a copy with fewer layers, with at least one of each kind.

Random numbers are added to all weights, so that zeros (a new head, a closed gate, half of a new adapter) hide nothing.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from patchkernels.hf.small_config import small_config
from patchkernels.numerics import FLOAT_DTYPES

LARGEST_COPY = 2**24  # parameters of a whole copy: 64 MiB in fp32, and as much for each of three sets of gradients
LARGEST_TRUNCATED_COPY = 2**29  # parameters of a copy with fewer layers: 2 GiB in fp32, and as much for gradients
# Standard deviations of what is added to the weights. A matrix (..., n) turns inputs of variance 1 into outputs of
# variance MATRIX_NOISE**2, so that rows of logits differ by far more than rounding errors. More noise would make models
# of many layers chaotic: rounding errors would grow from layer to layer, or all tokens would give the same logits.
MATRIX_NOISE, VECTOR_NOISE = 0.3, 0.1
SEED = 2407
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# Attributes of modules that do not change what they compute, or do so by classes of their own (quantisation).
OTHER_ATTRIBUTES = (
    "training", "gradient_checkpointing", "name_or_path", "is_loaded_in", "is_quantized", "quantization",
)  # fmt: skip


class CopyError(ValueError):
    """Why a model cannot be copied."""


class CopyToTry(NamedTuple):
    """A model that can be run, trained and changed in place of the model it was made of."""

    model: Any
    is_small: bool  # whether its sizes are others, and not only the number of its layers


def copy_to_try(model: Any) -> CopyToTry:
    """A copy of the model in fp32 and in evaluation mode, without hooks, whose parameters all require gradients.

    Raises:
        ValueError: no copy is possible, with the reason and what can be done.
    """
    readable = all(is_readable(parameter) for parameter in model.parameters())
    obstacle = "its weights cannot be read, because they are on the meta device, sharded or quantised"
    if readable:
        try:
            if count_parameters(model) <= LARGEST_COPY:
                return CopyToTry(prepared(deep_copy(model, {})), False)
            obstacle = f"it has more than {LARGEST_COPY:,} parameters"
        except Exception as error:
            obstacle = describe(error)
    try:
        return CopyToTry(prepared(small_copy(model)), True)
    except Exception as error:
        difference = describe(error)
    layers = shortest_prefixes(model)
    if readable and layers:
        count = count_parameters(model, layers)
        if count <= LARGEST_TRUNCATED_COPY:
            return CopyToTry(prepared(deep_copy(model, layers)), False)
        obstacle = f"its first layers of each kind have {count:,} parameters, more than {LARGEST_TRUNCATED_COPY:,}"
    raise ValueError(
        f"it cannot be copied ({obstacle}), and a tiny model does not stand for it ({difference}); "
        "enable the model before it is sharded, quantised, given adapters or changed otherwise"
    )


def describe(error: Exception) -> str:
    return str(error) if type(error) is CopyError else f"{type(error).__name__}: {error}"


def original_class(module: Any) -> Any:
    """The class of a module as it was before ``fully_shard`` replaced it by a subclass."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def is_readable(parameter: Tensor) -> bool:
    """Whether a parameter is a tensor of floating-point numbers that this process holds as a whole."""
    ordinary = type(parameter) in (nn.Parameter, Tensor) and parameter.dtype in FLOAT_DTYPES
    return ordinary and parameter.device.type != "meta" and parameter.numel() > 0  # ZeRO-3 leaves empty tensors


def kept_modules(model: Any, layers: dict[Any, int]) -> Iterator[Any]:
    """All modules of the model but those in the layers that are left out."""
    dropped = {id(module) for owner, depth in layers.items() for layer in owner[depth:] for module in layer.modules()}
    return (module for module in model.modules() if id(module) not in dropped)


def kept_parameters(model: Any, layers: dict[Any, int]) -> list[nn.Parameter]:
    """The parameters of these modules, each once."""
    found = {id(p): p for module in kept_modules(model, layers) for p in module.parameters(recurse=False)}
    return list(found.values())


def count_parameters(model: Any, layers: dict[Any, int] | None = None) -> int:
    return sum(parameter.numel() for parameter in kept_parameters(model, layers or {}))


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers that are added to a parameter, drawn on the CPU so that they are the same on every device."""
    std = MATRIX_NOISE / like.shape[-1] ** 0.5 if like.ndim > 1 else VECTOR_NOISE
    return torch.randn(like.shape, generator=generator, device="cpu").mul_(std).to(like.device)


def deep_copy(model: Any, layers: dict[Any, int]) -> Any:
    """A deepcopy with random weights added, without hooks, and with the first layers only of each list in ``layers``.

    ``deepcopy`` looks objects up in a dictionary of those it has copied. Here this dictionary is filled beforehand:
    with the fp32 copy of every parameter, so that no other copy is made and shared parameters stay shared, and with no
    hooks for every dictionary of hooks.
    """
    generator = torch.Generator("cpu").manual_seed(SEED)
    memo: dict[int, Any] = {}
    for parameter in kept_parameters(model, layers):
        weight = parameter.detach().to(torch.float32, copy=True)
        memo[id(parameter)] = nn.Parameter(weight.add_(noise(weight, generator)))
    for module in kept_modules(model, layers):
        forward = forward_of_instance(module)
        is_copied = isinstance(forward, functools.partial) or getattr(forward, "__self__", None) is module
        if forward is not None and not is_copied:
            raise CopyError(
                f"the forward of a {type(module).__name__} was replaced on the instance by a function, which would "
                "run the model itself in a copy; replace it in a subclass, or by types.MethodType(function, module)"
            )
        memo |= {id(value): OrderedDict() for name, value in vars(module).items() if is_hooks(name, value)}
    for owner, depth in layers.items():
        memo[id(owner)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in owner[:depth]])
    copied = copy.deepcopy(model, memo)
    for depth in layers.values():
        copied.config.get_text_config().num_hidden_layers = depth
    return copied


def is_hooks(name: str, value: Any) -> bool:
    return "_hooks" in name and isinstance(value, dict)


def forward_of_instance(module: Any) -> Any:
    """The forward that was set on this instance in place of the one of its class; None if there is no such forward."""
    forward = vars(module).get("forward")
    return None if getattr(forward, "__func__", forward) is original_class(module).forward else forward


def small_copy(model: Any) -> Any:
    """A tiny model of the class and the configuration of this one, on its device, with random weights.

    Raises:
        CopyError: the model has other modules than its configuration says.
    """
    cls, device = original_class(model), next(model.parameters()).device
    torch.default_generator.manual_seed(SEED)  # so that all processes of a run come to the same decision
    with torch.device("cpu"):
        config = small_config(model.config)
        set_for_trial(config, cls)
        small = cls(config).float()
        add_adapters(small, vars(model).get("peft_config", {}))
    check_same_modules(model, small)
    for name in ("_loss_function", "loss_type"):  # the loss of the instance, where it is not that of the class
        if name in vars(model):
            vars(small)[name] = vars(model)[name]
    generator = torch.Generator("cpu").manual_seed(SEED)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(noise(parameter, generator))
    return small.to("cpu" if device.type == "meta" else device)


def add_adapters(model: Any, adapters: dict[str, Any]) -> None:
    """Adds adapters of PEFT, by name, with the same settings as in a model that has them."""
    if adapters:
        import peft

        for name, settings in adapters.items():
            peft.inject_adapter_in_model(copy.deepcopy(settings), model, name)


def check_same_modules(model: Any, small: Any) -> None:
    """Raises CopyError if one of two models has modules of a kind that the other has not.

    In a quantised model any module may stand for a linear layer other than the head.
    """
    linear = []
    if getattr(model, "is_quantized", False):
        head = small.get_output_embeddings()
        linear = [
            without_numbers(name)
            for name, module in small.named_modules()
            if isinstance(getattr(module, "base_layer", module), nn.Linear) and module is not head
        ]
    large_kinds, small_kinds = (
        {kind for kind in kinds_of_modules(m) if not any(f"{kind.name}.".startswith(f"{name}.") for name in linear)}
        for m in (model, small)
    )
    for owner, kinds in (
        ("the model", large_kinds - small_kinds),
        ("a tiny model of its configuration", small_kinds - large_kinds),
    ):
        if kinds:
            kind = min(kinds, key=str)
            others = [other for other in large_kinds | small_kinds if other[:-1] == kind[:-1] and other != kind]
            named = sorted(kind.attributes - others[0].attributes) if others else []
            values = f" with {' and '.join(f'{name} = {value}' for name, value in named)}" if named else ""
            raise CopyError(f"only {owner} has {kind}{values}")


class ModuleKind(NamedTuple):
    """What modules must have in common, to be the same but for their sizes and their place in a list."""

    name: str  # with * for all numbers
    module: Any  # the class
    parameters: tuple[str, ...]
    has_own_forward: bool  # whether the forward of the class was replaced on the instance
    attributes: frozenset[tuple[str, str]]  # of the instance: booleans, texts and functions

    def __str__(self) -> str:
        own_forward = ", with a forward of its own" if self.has_own_forward else ""
        parameters = ", ".join(self.parameters) or "none"
        return f"{self.name or 'a model'} of class {self.module.__name__} (parameters: {parameters}{own_forward})"


def kinds_of_modules(model: Any) -> set[ModuleKind]:
    return {
        ModuleKind(
            without_numbers(name),
            original_class(module),
            tuple(sorted(key for key, value in module._parameters.items() if value is not None)),
            forward_of_instance(module) is not None,
            frozenset(attributes_of(module)),
        )
        for name, module in model.named_modules()
    }


def attributes_of(module: Any) -> Iterator[tuple[str, str]]:
    """What an instance says about how it computes, by name: booleans, texts and functions, but no sizes."""
    for name, value in vars(module).items():
        if name.startswith(("_", *OTHER_ATTRIBUTES)):
            continue
        if isinstance(value, bool | str):
            yield name, repr(value)
        elif isinstance(value, FUNCTIONS):
            yield name, getattr(value, "__qualname__", "a function")


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def shortest_prefixes(model: Any) -> dict[Any, int]:
    """How many layers of each list of all layers are enough to have one of every kind of them."""
    config = model.config.get_text_config()
    depth: int = getattr(config, "num_hidden_layers", 0)
    names: Any = getattr(config, "layer_types", None) or [""] * depth
    lists = {}
    for module in model.modules():
        if type(module) is nn.ModuleList and len(module) == depth == len(names) > 0:
            kinds = [(kinds_of_modules(layer), name) for layer, name in zip(module, names)]
            lists[module] = 1 + max(kinds.index(kind) for kind in kinds)
    return {module: max(lists.values()) for module in lists}


def set_for_trial(config: Any, cls: Any) -> None:
    """Sets, in the configuration of a copy, what does not change the results but could keep the copy from running."""
    for settings in {id(c): c for c in (config, config.get_text_config())}.values():
        settings.use_cache, settings.return_dict = False, True
        settings.dtype = torch.float32
    if config._attn_implementation not in (None, "eager", "sdpa"):  # others need a GPU, or 16-bit numbers
        config._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"
    config._experts_implementation = "eager"  # the others need 16-bit numbers on some devices
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def prepared(model: Any) -> Any:
    """The copy with all buffers in fp32 too, in evaluation mode, with gradients for all parameters."""
    set_for_trial(model.config, original_class(model))
    for module in model.modules():
        # transformers captures some outputs, such as those of routers, by hooks, which the copy has not. It installs
        # them in a model without this mark.
        vars(module).pop("_output_capturing_hooks_installed", None)
        if getattr(module, "gradient_checkpointing", False):  # reentrant checkpoints give no gradients when asked
            module.gradient_checkpointing = False
    return model.float().eval().requires_grad_(True)
