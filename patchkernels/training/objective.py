"""How a training run calls its model for a loss: which interface the model has, and what its wrappers are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from patchkernels.hf.patch_step import PatchSizeMixin
from patchkernels.nn import PatchEmbedding


class Objective:
    """The loss of a model on rows of tokens, at any patch size. The model has one of three interfaces:

    - a ``forward(input_ids, labels, patch_size)``, which returns the loss;
    - :func:`patchkernels.hf.enable` has prepared it;
    - a ``forward(input_ids, labels)`` or ``forward(input_ids)`` which returns the loss, and in which a
      :class:`patchkernels.PatchEmbedding` decides on the patch size (``embedding.patch_size``).

    The loss is a scalar tensor or the attribute ``loss`` of what is returned, the mean over all targets of the rows.

    Args:
        model: the model itself, without a wrapper.

    Raises:
        TypeError: none of these interfaces.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.parameters = inspect.signature(model.forward).parameters
        self.arguments = self._find_interface()

    def _find_interface(self) -> Callable[[Tensor, Tensor, int], dict[str, Any]]:
        """The function that prepares a call at a patch size and returns the arguments of the call."""
        if isinstance(self.model, PatchSizeMixin):
            return self._enabled
        names = list(self.parameters)
        if "patch_size" in names and len(names) > 2:
            return lambda ids, labels, patch_size: {names[0]: ids, names[1]: labels, "patch_size": patch_size}
        self.embeddings = [module for module in self.model.modules() if isinstance(module, PatchEmbedding)]
        if self.embeddings and names:
            return self._with_embeddings
        raise TypeError(
            f"{type(self.model).__name__} cannot take patch steps: expected forward(input_ids, labels, patch_size), a "
            "PatchEmbedding in the model, or a model prepared by patchkernels.hf.enable; got "
            f"forward({', '.join(names)})"
        )

    def _enabled(self, ids: Tensor, labels: Tensor, patch_size: int) -> dict[str, Any]:
        self.model.patch_size = patch_size
        return {"input_ids": ids, "labels": labels}

    def _with_embeddings(self, ids: Tensor, labels: Tensor, patch_size: int) -> dict[str, Any]:
        for embedding in self.embeddings:
            embedding.patch_size = patch_size
        return dict(zip(self.parameters, (ids, labels)))

    @property
    def takes_labels(self) -> bool:
        """Whether the labels may differ from the ids."""
        return len(self.parameters) > 1

    @property
    def takes_reduction(self) -> bool:
        """Whether ``reduction="none"`` gives the loss of every target, ``(B, T / K, K)``, as ``PatchLM``'s does."""
        return "reduction" in self.parameters

    def __call__(
        self,
        module: nn.Module,
        ids: Tensor,  # (B, T)
        labels: Tensor,  # (B, T)
        patch_size: int,
        reduction: str = "mean",
        documents: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """The loss, computed by calling ``module``, which is the model or a wrapper of it."""
        options: dict[str, Any] = {} if reduction == "mean" else {"reduction": reduction}
        if documents is not None:
            options["document_ids"] = documents
        output = module(**self.arguments(ids, labels, patch_size), **options)
        loss = getattr(output, "loss", output)
        if not isinstance(loss, Tensor) or (reduction != "none" and loss.ndim > 0):
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise TypeError(
                f"{type(self.model).__name__}.forward must return the loss, a scalar tensor or an attribute 'loss'; "
                f"got {type(loss).__name__}{shape}"
            )
        return loss


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
