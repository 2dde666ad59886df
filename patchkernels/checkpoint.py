"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all; nothing in them is code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "step-"


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Writes ``step-XXXXXXXX`` under a temporary name, renames it, then removes all but the newest ``keep``."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{PREFIX}{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}"
    for leftover in root.glob(f".{PREFIX}*"):  # of a kill
        shutil.rmtree(leftover)
    temporary.mkdir()
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, temporary / "model.safetensors")
    moments = optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": value.contiguous() for i, entry in moments.items() for name, value in entry.items()}
    save_file(flat, temporary / "optimizer.safetensors")
    save_file(_generators(), temporary / "random.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


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
    for name in ("model", "optimizer", "random"):
        try:
            parts[name] = load_file(folder / f"{name}.safetensors")
        except Exception as error:
            raise ValueError(f"the checkpoint {folder} is damaged: {name}.safetensors: {error}") from error
    parameters = dict(model.named_parameters())
    saved = {n: tuple(t.shape) for n, t in parts["model"].items()}
    expected = {n: tuple(p.shape) for n, p in parameters.items()}
    if saved != expected:
        other = sorted(n for n in saved.keys() | expected.keys() if saved.get(n) != expected.get(n))
        raise ValueError(f"the checkpoint {folder} is of another model: {other[:5]} differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(parts["model"][name])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(parts["random"]["cpu"])
    for name, value in parts["random"].items():
        if name.startswith("cuda") and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name[4:]))


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
