"""Checkpoints: a folder that appears whole or not at all. One process writes safetensors and JSON, several write
torch.distributed.checkpoint's files, each its own part. Either loads on any number of processes.
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

PREFIX = "step-"
DISTRIBUTED = "distributed"


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> None:
    """Writes ``step-XXXXXXXX`` under a temporary name, renames it, then removes all but the newest ``keep``."""
    temporary = begin(root, step)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, temporary / "model.safetensors")
    moments = optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": value.contiguous() for i, entry in moments.items() for name, value in entry.items()}
    save_file(flat, temporary / "optimizer.safetensors")
    finish(temporary, root, step, state, keep)


def save_distributed(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> None:
    """The same by all processes together, on a file system that they share; each writes what it holds."""
    first = dist.get_rank() == 0
    temporary = begin(root, step) if first else temporary_name(root, step)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary / DISTRIBUTED)
    dist.barrier()
    if first:
        finish(temporary, root, step, state, keep)
    dist.barrier()


def temporary_name(root: Path, step: int) -> Path:
    return root / f".{PREFIX}{step:08d}"


def begin(root: Path, step: int) -> Path:
    """An empty folder; what a kill left of others is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)
    temporary = temporary_name(root, step)
    temporary.mkdir()
    return temporary


def finish(temporary: Path, root: Path, step: int, state: dict[str, Any], keep: int) -> None:
    save_file(_generators(), temporary / "random.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    final = root / f"{PREFIX}{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what a kill left half-written bears another name."""
    return sorted(p for p in root.glob(f"{PREFIX}*") if (p / "state.json").is_file())


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON of a checkpoint. ``ValueError`` if it is damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except ValueError as error:
        raise ValueError(f"the checkpoint {folder} is damaged: state.json: {error}") from error
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Parameters, optimizer state and random generators, in place.

    Raises:
        ValueError: a damaged file, or parameters of another model.
    """
    parts = {}
    distributed = (folder / DISTRIBUTED).is_dir()
    for name in ("random",) if distributed else ("random", "model", "optimizer"):
        try:
            parts[name] = load_file(folder / f"{name}.safetensors")
        except Exception as error:
            raise ValueError(f"the checkpoint {folder} is damaged: {name}.safetensors: {error}") from error
    if distributed:
        _load_distributed(folder, model, optimizer)
    else:
        _load_files(folder, parts["model"], parts["optimizer"], model, optimizer)
    torch.set_rng_state(parts["random"]["cpu"])
    for name, value in parts["random"].items():
        if name.startswith("cuda") and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name[4:]))


def _load_distributed(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        state_dict_loader.load(state, checkpoint_id=folder / DISTRIBUTED, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        raise ValueError(f"the checkpoint {folder} is damaged or of another model: {error}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _load_files(
    folder: Path,
    weights: dict[str, Tensor],
    flat: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    parameters = dict(model.named_parameters())
    saved = {n: tuple(t.shape) for n, t in weights.items()}
    expected = {n: tuple(p.shape) for n, p in parameters.items()}
    if saved != expected:
        other = sorted(n for n in saved.keys() | expected.keys() if saved.get(n) != expected.get(n))
        raise ValueError(f"the checkpoint {folder} is of another model: {other[:5]} differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_placed(weights[name], parameter))
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = _placed(value, ordered[int(index)])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of a parameter's shape as its shards, where the parameter is sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
