"""How a training run calls its model for a loss: which interface the model has, and what its wrappers are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from patchkernels.hf.patch_step import PatchSizeMixin
from patchkernels.nn import PatchEmbedding

IDS, PATCH_SIZE = "input_ids", "patch_size"
LABELS = ("labels", "targets", "target")  # what models call the parameter for labels
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Objective:
    """The loss of a model on rows of tokens, at any patch size.

    The patch size is an argument ``patch_size`` of the model's forward. If there is none, it is the attribute
    ``patch_size`` of every :class:`patchkernels.PatchEmbedding` in the model and of every model in it that
    :func:`patchkernels.hf.enable` has prepared; :meth:`restore` gives these their own values again.

    Token ids are the argument ``input_ids``, or else the first one. Labels are the argument ``labels``, ``targets`` or
    ``target``, or else the only other one without a default; a forward without any takes the ids as its labels. A
    forward that names no argument (``*args, **kwargs``) is given ``input_ids`` and ``labels``. The loss, the mean over
    all targets of the rows, is what the model returns, or its attribute or entry ``loss``.

    Args:
        model: the model itself, without a wrapper.

    Raises:
        TypeError: none of these interfaces.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.names = {name: p.default is p.empty for name, p in parameters.items() if p.kind in BY_NAME}
        kinds = {parameter.kind for parameter in parameters.values()}
        takes_any = bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})
        if not self.names and inspect.Parameter.VAR_KEYWORD in kinds:  # of a wrapper, which passes on what it is given
            self.names = {IDS: True, LABELS[0]: True}
        self.patched: list[Any] = []
        if PATCH_SIZE not in self.names:
            self.patched = [m for m in model.modules() if isinstance(m, PatchEmbedding | PatchSizeMixin)]
        self.patch_sizes = [module.patch_size for module in self.patched]
        self.ids = IDS if IDS in self.names else next((name for name in self.names if name != PATCH_SIZE), None)
        self.labels = self._labels()
        if (
            self.ids is None
            or not (self.patched or PATCH_SIZE in self.names)
            or (self.labels is None and (takes_any or PATCH_SIZE in self.names))
            or any(needed and name not in (self.ids, self.labels, PATCH_SIZE) for name, needed in self.names.items())
        ):
            raise TypeError(
                f"{type(model).__name__} cannot take patch steps: expected forward(input_ids, labels, patch_size), or "
                "forward(input_ids, labels) with a PatchEmbedding in the model or a model that patchkernels.hf.enable "
                f"prepared; got forward{inspect.signature(model.forward)}"
            )

    def _labels(self) -> str | None:
        """The name of the parameter for labels."""
        known = [name for name in LABELS if name in self.names]
        needed = [n for n, is_needed in self.names.items() if is_needed and n not in (self.ids, PATCH_SIZE)]
        return known[0] if known else needed[0] if len(needed) == 1 else None

    @property
    def takes_labels(self) -> bool:
        """Whether the labels may differ from the ids."""
        return self.labels is not None

    @property
    def takes_reduction(self) -> bool:
        """Whether ``reduction="none"`` gives the loss of every target, ``(B, T / K, K)``, as ``PatchLM``'s does."""
        return "reduction" in self.names

    def __call__(
        self,
        module: nn.Module,
        ids: Tensor,  # (B, T)
        labels: Tensor,  # (B, T)
        patch_size: int,
        reduction: str = "mean",
        documents: Tensor | None = None,  # (B, T)
        slot_weight: Tensor | None = None,  # (K)
    ) -> Tensor:
        """The loss, computed by calling ``module``, which is the model or a wrapper of it.

        Raises:
            TypeError: what the model returns is no loss of the expected shape.
        """
        arguments: dict[str, Any] = {self.ids or IDS: ids.clone()}  # a forward may change what it is given
        if self.labels is not None:
            arguments[self.labels] = labels.clone()
        if PATCH_SIZE in self.names:
            arguments[PATCH_SIZE] = patch_size
        for patched in self.patched:
            patched.patch_size = patch_size
        if reduction != "mean":
            arguments["reduction"] = reduction
        if documents is not None:
            arguments["document_ids"] = documents
        if slot_weight is not None:
            arguments["target_weight"] = slot_weight
        output = module(**arguments)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        shape = (len(ids), ids.shape[1] // patch_size, patch_size) if reduction == "none" else ()
        if not isinstance(loss, Tensor) or tuple(loss.shape) != shape:
            wanted = f'with reduction="none" losses of shape {shape}' if shape else "the loss, a scalar tensor"
            found = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise TypeError(
                f"{type(self.model).__name__}.forward must return {wanted}, or an attribute or entry 'loss' with it; "
                f"got {type(loss).__name__}{found}"
            )
        return loss

    def restore(self) -> None:
        """Gives the embeddings and models that hold the patch size the one that they came with."""
        for module, patch_size in zip(self.patched, self.patch_sizes):
            module.patch_size = patch_size


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and of torch.compile's wrapper."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def synchronizing_module(model: nn.Module) -> nn.Module:
    """The module that exchanges gradients: the DDP wrapper, an FSDP2 module, or else the model itself."""
    while not isinstance(model, DistributedDataParallel | FSDPModule) and (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper contains, None if the module is no wrapper."""
    inner: nn.Module | None = model._modules.get("_orig_mod")  # of torch.compile
    return model.module if isinstance(model, DistributedDataParallel) else inner
