"""What can be trained by :func:`patchkernels.training.fit`: its model, optimizers and rows, checked before any work."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from patchkernels.data.batches import Rows
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import Schedule
from patchkernels.training.checkpoint import check_settings
from patchkernels.training.objective import Objective, synchronizing_module, unwrapped
from patchkernels.training.processes import Processes, check_data_parallel, current_processes
from patchkernels.training.row_batches import CheckedRows, stacked
from patchkernels.training.run import count_targets

logger = logging.getLogger("patchkernels")


def raw_tokens(tokens: Any, rows: CheckedRows) -> int:
    """How many raw tokens the run reads."""
    if tokens is not None and not isinstance(tokens, int | float | np.number):
        raise TypeError(f"tokens must be a number, got {tokens!r}")
    if tokens is None and not rows.has_length:
        raise ValueError("rows without a length need tokens, the number of raw tokens to read")
    if tokens is not None and not 0 < tokens < math.inf:
        raise ValueError(f"tokens must be positive and finite, got {tokens}")
    return int(tokens) if tokens is not None else len(rows) * rows.context


def check_targets(schedule: Schedule, rows: CheckedRows) -> None:
    """Raises ``ValueError`` if a phase's rows are a single patch, which has no next patch to predict.

    Warns if all labels of the rows that were looked at are ignored.
    """
    if rows.brings_labels and all(bool((row["labels"][1:] == IGNORE_INDEX).all()) for row in rows.some()):
        logger.warning("all labels of the rows are ignored: there may be nothing to train on")
    for phase in schedule.phases:
        if schedule.positions(phase) < 2:
            raise ValueError(
                f"rows of {schedule.row_tokens(phase)} tokens have no targets at patch size {phase.patch_size}: "
                "expected two patches or more"
            )


def as_list(optimizer: Any) -> list[Optimizer]:
    """The optimizers. ``TypeError`` if there is none, or something else."""
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        names = [o.__name__ if isinstance(o, type) else type(o).__name__ for o in optimizers]
        raise TypeError(f"expected one or several torch.optim.Optimizer, got {names}")
    return optimizers


def check_model(model: nn.Module, optimizers: list[Optimizer], all_rows: list[CheckedRows]) -> Processes:
    """Checks that these can be trained together, and returns the processes that train them.

    Raises:
        TypeError: not a module, one with no interface that is known, or with a tensor that cannot be saved.
        ValueError: parameters on the meta device or on several devices, labels that the model does not take, or several
            processes without FSDP2 or DDP.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    inner = unwrapped(model)
    objective = Objective(inner)
    if any(rows.brings_labels for rows in all_rows) and not objective.takes_labels:
        raise ValueError(f"the rows have labels, or an attention_mask, but {type(inner).__name__}.forward takes none")
    check_optimizers(optimizers, list(inner.parameters()))
    check_tensors(inner)
    devices = {parameter.device for parameter in inner.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(f"the model's parameters must be on one device, got {sorted(map(str, devices))}")
    processes = current_processes(devices.pop())
    if processes.world_size > 1:
        check_data_parallel(synchronizing_module(model))
    return processes


def check_optimizers(optimizers: list[Optimizer], parameters: list[nn.Parameter]) -> None:
    """Checks that the optimizers can train these parameters, and warns if some are in no optimizer.

    Raises:
        TypeError: an optimizer whose step needs a closure, or whose settings cannot be saved.
        ValueError: parameters that are not the model's, that are in two optimizers, or without a learning rate; no
            parameter that requires gradients; or a scheduler of the learning rate.
    """
    seen: set[int] = set()
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            raise ValueError(
                f"{name} has a scheduler of its learning rate, which is set by warmup, decay and lr_shape instead"
            )
        parameters_of_step = inspect.signature(optimizer.step).parameters.values()
        if any(p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters_of_step):
            raise TypeError(f"{name}.step needs a closure, which computes the loss several times in a step")
        for group in optimizer.param_groups:
            if not (isinstance(group.get("lr"), float | int | Tensor) and float(group["lr"]) > 0):
                raise ValueError(
                    f"every group of parameters needs a learning rate above 0, got lr={group.get('lr')} in {name}; "
                    "leave out of the optimizers what is not to be trained"
                )
        check_settings(optimizer)
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own & seen:
            raise ValueError(f"{len(own & seen)} parameters of {name} are in another optimizer too")
        seen |= own
    if seen - {id(parameter) for parameter in parameters}:
        raise ValueError(
            "the optimizer holds parameters that are not the model's: make it after the model is moved or sharded"
        )
    if not any(parameter.requires_grad for parameter in parameters if id(parameter) in seen):
        raise ValueError("no parameter of the optimizers requires gradients")
    left_out = sum(parameter.requires_grad and id(parameter) not in seen for parameter in parameters)
    if left_out:
        logger.warning("%d parameters that require gradients are in no optimizer and are not trained", left_out)


def check_tensors(model: nn.Module) -> None:
    """Raises ``TypeError`` if a parameter or a buffer is of a kind that safetensors does not write."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        try:
            if tensor.layout != torch.strided:
                raise ValueError
            save({name: torch.empty(1, dtype=tensor.dtype)})
        except Exception as error:
            raise TypeError(f"{name} cannot be saved: a tensor of {tensor.dtype} and {tensor.layout}") from error


def validation_rows(checked: CheckedRows, training: CheckedRows) -> Rows:
    """All validation rows, as one batch. ``ValueError`` unless they have targets and the length of training rows."""
    if checked.context != training.context:
        raise ValueError(
            f"validation rows must have {training.context} tokens, as those of training, got {checked.context}"
        )
    rows = stacked(list(checked), not checked.brings_labels)
    if not int(count_targets(rows, 1)):
        raise ValueError("the validation rows have no targets: all their labels are ignored")
    return rows
