"""Swaps the classes of a model, its embedding and its head for those that take patch steps, and restores them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from patchkernels.hf.class_swap import check_restorable, restore_class, swap_class
from patchkernels.hf.modules import (
    LogitMap,
    LossHeadMixin,
    PatchEmbeddingMixin,
    PatchSettings,
    PatchState,
    has_foreign_hooks,
    options_of,
    runs_forward_of,
)
from patchkernels.hf.patch_step import PatchStepMixin


class StepKind(NamedTuple):
    """Which patch step a model takes."""

    swaps_embedding: bool  # whether the operator averages embeddings, or else the embedding's output is averaged
    logit_map: LogitMap | None  # None: the loss is computed from the model's logits, and not in its head


def can_swap_embedding(model: Any) -> bool:
    """Whether the model's embedding does nothing but look up rows of a table."""
    table = model.get_input_embeddings()
    plain = runs_forward_of(table, nn.Embedding) and not has_foreign_hooks(table)
    return plain and table.max_norm is None and not table.scale_grad_by_freq


def can_swap_head(model: Any) -> bool:
    """Whether the model's head does nothing but a matrix product."""
    head = model.get_output_embeddings()
    return runs_forward_of(head, nn.Linear) and not has_foreign_hooks(head)


def attach(model: Any, kind: StepKind) -> PatchState:
    """Makes the model take patch steps of this kind. Returns the state that its modules share."""
    state = PatchState(PatchSettings(logit_map=kind.logit_map, loss_options=options_of(model.loss_function)))
    swap_class(model, PatchStepMixin, state)
    if kind.swaps_embedding:
        swap_class(model.get_input_embeddings(), PatchEmbeddingMixin, state)
    if kind.logit_map is not None:
        swap_class(model.get_output_embeddings(), LossHeadMixin, state)
    return state


def detach(model: Any) -> None:
    """Restores the classes of the model and all its modules. ``ValueError`` if one was changed since."""
    modules = list(model.modules())
    for module in modules:
        check_restorable(module)
    for module in modules:
        restore_class(module)


@contextlib.contextmanager
def attached(model: Any, kind: StepKind) -> Iterator[PatchState]:
    """Makes the model take patch steps of this kind inside the block."""
    state = attach(model, kind)
    try:
        yield state
    finally:
        detach(model)
