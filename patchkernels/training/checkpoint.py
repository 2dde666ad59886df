"""Saving and loading a training run. A checkpoint is a folder that gets its final name only when it is complete.

A run on one process saves its model with safetensors and its optimizers with torch, which loads them without running
code. On several processes each saves its own shards with ``torch.distributed.checkpoint``. Both kinds of checkpoint
load on any number of processes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

PREFIX = "step-"  # of a complete checkpoint's name; an incomplete one has a dot before it
STATE_FILE = "state.json"
CPU = "cpu"
OPTIMIZER_FILE = "optimizer.pt"
BUFFER = "buffer "  # what the names of buffers in the file of a process begin with
DISTRIBUTED = "distributed"  # the folder within a checkpoint that holds the shards of several processes


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizers: list[Optimizer], state: dict[str, Any], keep: int
) -> None:
    """Saves a run on one process, and removes all but the newest ``keep`` checkpoints.

    ``state`` holds whatever else the caller needs to resume; it is written as JSON, and :func:`read_state` returns it.

    Raises:
        TypeError: an optimizer's state or a module's extra state holds an object that torch does not load without
            running code.
    """
    temporary = _begin(root, step)
    save_file(_separate(_tensors(model)), temporary / "model.safetensors")
    states = {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "model": _extra_states(model)}
    torch.save(states, temporary / OPTIMIZER_FILE)
    _check_loadable(temporary / OPTIMIZER_FILE, "the state of an optimizer, or the extra state of a module, holds")
    save_file(_generator_states(), temporary / _process_file(0))
    _finish(temporary, root, step, state, keep)


def save_distributed(
    root: Path, step: int, model: nn.Module, optimizers: list[Optimizer], state: dict[str, Any], keep: int
) -> None:
    """Saves a run on several processes. All of them must call this function and share the file system.

    Raises:
        TypeError: an optimizer's state has an entry that is not of a parameter.
    """
    for optimizer in optimizers:
        if others := [key for key in optimizer.state if not isinstance(key, Tensor)]:
            raise TypeError(f"several processes cannot save the state {others[0]!r} of {type(optimizer).__name__}")
    is_first = dist.get_rank() == 0
    temporary = _begin(root, step) if is_first else _temporary_folder(root, step)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizers)
    buffers = _own_buffers(model)
    values = {"model": {name: value for name, value in weights.items() if name not in buffers}, "optimizer": moments}
    state_dict_saver.save(values, checkpoint_id=temporary / DISTRIBUTED)
    own = {f"{BUFFER}{name}": buffer for name, buffer in buffers.items()}
    save_file(_generator_states() | _separate(own), temporary / _process_file(dist.get_rank()))
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
    """Adds ``state``, flushes all files to disk, renames the folder, removes old checkpoints."""
    (temporary / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    final = root / f"{PREFIX}{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old.rename(root / f".{old.name}"))  # a name that is swept up if this process is killed


def read_state(folder: Path) -> dict[str, Any]:
    """The ``state`` that was saved with a checkpoint, and its step. ``ValueError`` if the file is damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {STATE_FILE}: {error}") from error
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Loads parameters, buffers, the optimizers' state and random generators, all in place.

    The generators of a process are left as they are if the checkpoint is of fewer processes.

    Raises:
        ValueError: a file is damaged, or the parameters are those of another model.
    """
    file = _process_file(dist.get_rank() if dist.is_initialized() else 0)
    is_there = (folder / file).exists()
    own = _read_tensors(folder, file if is_there else _process_file(0))
    if (folder / DISTRIBUTED).is_dir():
        _load_distributed(folder, model, optimizers)
    else:
        _load_files(folder, model, optimizers)
    _load_buffers(model, {name.removeprefix(BUFFER): value for name, value in own.items() if name.startswith(BUFFER)})
    for device, state in own.items():
        if device.startswith(BUFFER) or not is_there:
            continue
        if device == CPU:
            torch.set_rng_state(state)
        elif torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _read_tensors(folder: Path, file: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / file)
    except Exception as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {file}: {error}") from error


def _load_distributed(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> None:
    weights, optimizer_state = get_state_dict(model, optimizers)
    moments: dict[str, Any] = dict(optimizer_state)
    path = folder / DISTRIBUTED
    try:
        # get_state_dict makes a state for every parameter. One that never had a gradient has none in the checkpoint.
        keys = list(FileSystemReader(path).read_metadata().state_dict_metadata)
        states = {
            name: entry
            for name, entry in moments["state"].items()
            if any(key.startswith(f"optimizer.state.{name}.") for key in keys)
        }
        own = _own_buffers(model)
        kept = {name: value for name, value in weights.items() if name not in own}
        state: dict[str, Any] = {"model": kept, "optimizer": {**moments, "state": states}}
        state_dict_loader.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # CheckpointException is not a subclass of Exception
        raise ValueError(f"the checkpoint {folder} is damaged or of another model: {error}") from error
    set_state_dict(
        model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )  # fmt: skip
    entries = {parameter: states.get(name, {}) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        _keep_dtypes(optimizer, entries)


def _load_files(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> None:
    saved, parameters = _read_tensors(folder, "model.safetensors"), dict(model.named_parameters())
    differing = {name for name, value in parameters.items() if name not in saved or saved[name].shape != value.shape}
    buffers = {name: value for name, value in saved.items() if name not in parameters}
    differing |= {name for name in buffers if not _has_buffer(model, name)}
    differing |= dict(model.named_buffers()).keys() - saved.keys()
    if differing:
        raise ValueError(f"the checkpoint {folder} is of another model: {sorted(differing)[:5]} differ")
    states = _read_states(folder / OPTIMIZER_FILE)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_shard_of(saved[name], parameter))
    _load_buffers(model, buffers)
    for name, extra in states["model"].items():
        model.get_submodule(name).set_extra_state(extra)
    for optimizer, state in zip(optimizers, states["optimizers"], strict=True):
        for index, own in _parameters_by_index(optimizer).items():
            entry = state["state"].get(index)
            if entry is not None:
                state["state"][index] = {name: _shard_of(value, own) for name, value in entry.items()}
        load_optimizer(optimizer, state)


@torch.no_grad()
def _load_buffers(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Loads buffers. One that had another size, or was not there yet, is replaced."""
    buffers, device = dict(model.named_buffers()), next(model.parameters()).device
    for name, value in saved.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != value.shape:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = value.to(device)
            continue
        value = _shard_of(value, buffer)
        for dim, stride in enumerate(buffer.stride()):
            if stride == 0:  # expanded along this dimension: all elements share memory, which is written once
                buffer, value = buffer.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        buffer.copy_(value)


def _has_buffer(model: nn.Module, name: str) -> bool:
    """Whether a module has this buffer, which may be None."""
    owner, _, key = name.rpartition(".")
    modules = dict(model.named_modules())
    return owner in modules and key in modules[owner]._buffers


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)``, with every tensor in its own dtype, and not in that of its parameter."""
    optimizer.load_state_dict(state)
    parameters = _parameters_by_index(optimizer)
    _keep_dtypes(optimizer, {parameters[i]: entry for i, entry in state["state"].items() if i in parameters})


def _keep_dtypes(optimizer: Optimizer, saved: dict[Any, dict[str, Any]]) -> None:
    """Puts tensors into the optimizer's state again that have another dtype there than those saved."""
    for parameter, entry in optimizer.state.items():
        for name, value in saved.get(parameter, {}).items():
            if name in entry:
                entry[name] = _with_dtypes(entry[name], value)


def _with_dtypes(loaded: Any, saved: Any) -> Any:
    """What was loaded, with tensors as they were saved in place of those that have another dtype."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device, copy=True)
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple):
        return type(loaded)(_with_dtypes(*values) for values in zip(loaded, saved, strict=True))
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {name: _with_dtypes(value, saved[name]) for name, value in loaded.items()}
    return loaded


def _parameters_by_index(optimizer: Optimizer) -> dict[Any, Tensor]:
    """The parameters by the numbers that they have in the optimizer's ``state_dict``."""
    return dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))


def _read_states(file: Path) -> dict[str, Any]:
    try:
        states: dict[str, Any] = torch.load(file, map_location=CPU, weights_only=True)
        return states
    except Exception as error:
        raise ValueError(f"the checkpoint {file.parent} is damaged: {file.name}: {error}") from error


def check_settings(optimizer: Optimizer) -> None:
    """Raises ``TypeError`` if the optimizer's settings hold objects that torch does not load without running code."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict()["param_groups"], buffer)
    buffer.seek(0)
    _check_loadable(buffer, "the settings of an optimizer hold")


def _check_loadable(source: Path | io.BytesIO, description: str) -> None:
    """Raises ``TypeError`` if what ``torch.save`` wrote holds objects that torch does not load without running code."""
    try:
        torch.load(source, map_location=CPU, weights_only=True, mmap=isinstance(source, Path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            f"{description} an object that cannot be saved safely, {refused[1] if refused else error}: expected "
            "numbers, strings and tensors, and lists and dicts of them"
        ) from error


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, with copies of those that share memory with another, which safetensors does not write."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if memory in seen else tensor.contiguous()
        seen.add(memory)
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the model. Shared ones are there once."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of which each process has its own, such as running means of its rows: those that are not sharded."""
    return {name: buffer for name, buffer in model.named_buffers() if not isinstance(buffer, DTensor)}


def _extra_states(model: nn.Module) -> dict[str, Any]:
    """What modules save beside parameters and buffers (``get_extra_state``), by the modules' names."""
    return {
        name: module.get_extra_state()
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _shard_of(value: Any, parameter: Tensor | None) -> Any:
    """This process's shard of a full tensor. Anything of another shape than the parameter, and what belongs to an
    unsharded parameter, is returned as it is.
    """
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _process_file(rank: int) -> str:
    """The file that holds what a process has of its own: the states of random generators, and buffers."""
    return f"process-{rank}.safetensors"


def _generator_states() -> dict[str, Tensor]:
    """The states of torch's random generators by device."""
    states = {CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
