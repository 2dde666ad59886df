"""Saving and loading a training run. A checkpoint is a folder that gets its final name only when it is complete.

A run on one process saves safetensors and JSON. On several processes each saves its own shards with
``torch.distributed.checkpoint``. Both kinds of checkpoint load on any number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

PREFIX = "step-"  # of a complete checkpoint's name; an incomplete one has a dot before it
STATE_FILE = "state.json"
CPU = "cpu"
DISTRIBUTED = "distributed"  # the folder within a checkpoint that holds the shards of several processes


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> None:
    """Saves a run on one process, and removes all but the newest ``keep`` checkpoints.

    ``state`` holds whatever else the caller needs to resume; it is written as JSON, and :func:`read_state` returns it.
    """
    temporary = _begin(root, step)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, temporary / "model.safetensors")
    moments = optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": value.contiguous() for i, entry in moments.items() for name, value in entry.items()}
    save_file(flat, temporary / "optimizer.safetensors")
    _finish(temporary, root, step, state, keep)


def save_distributed(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> None:
    """Saves a run on several processes. All of them must call this function and share the file system."""
    is_first = dist.get_rank() == 0
    temporary = _begin(root, step) if is_first else _temporary_folder(root, step)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary / DISTRIBUTED)
    dist.barrier()
    if is_first:
        _finish(temporary, root, step, state, keep)
    dist.barrier()


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints in the folder, oldest first."""
    return sorted(folder for folder in root.glob(f"{PREFIX}*") if (folder / STATE_FILE).is_file())


def _temporary_folder(root: Path, step: int) -> Path:
    return root / f".{PREFIX}{step:08d}"


def _begin(root: Path, step: int) -> Path:
    """Makes an empty folder to write to, and removes unfinished folders that a killed process left."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)
    temporary = _temporary_folder(root, step)
    temporary.mkdir()
    return temporary


def _finish(temporary: Path, root: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Adds generator states and ``state``, flushes all files to disk, renames the folder, removes old checkpoints."""
    save_file(_generator_states(), temporary / "random.safetensors")
    (temporary / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    final = root / f"{PREFIX}{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    """The ``state`` that was saved with a checkpoint, and its step. ``ValueError`` if the file is damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {STATE_FILE}: {error}") from error
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads parameters, optimizer state and random generators, all in place.

    Raises:
        ValueError: a file is damaged, or the parameters are those of another model.
    """
    generator_states = _read_tensors(folder, "random")
    if (folder / DISTRIBUTED).is_dir():
        _load_distributed(folder, model, optimizer)
    else:
        _load_files(folder, model, optimizer)
    torch.set_rng_state(generator_states.pop(CPU))
    for device, state in generator_states.items():
        if torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / f"{name}.safetensors")
    except Exception as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {name}.safetensors: {error}") from error


def _load_distributed(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        state_dict_loader.load(state, checkpoint_id=folder / DISTRIBUTED, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # CheckpointException is not a subclass of Exception
        raise ValueError(f"the checkpoint {folder} is damaged or of another model: {error}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _load_files(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, flat = _read_tensors(folder, "model"), _read_tensors(folder, "optimizer")
    parameters = dict(model.named_parameters())
    saved = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if saved != expected:
        differing = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
        raise ValueError(f"the checkpoint {folder} is of another model: {differing[:5]} differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_shard_of(weights[name], parameter))
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = _shard_of(value, ordered[int(index)])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _shard_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a full tensor. Scalars, and tensors of unsharded parameters, are returned as they are."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _generator_states() -> dict[str, Tensor]:
    """The states of torch's random generators by device."""
    states = {CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
