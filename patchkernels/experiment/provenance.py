"""The provenance of a measurement: device, versions, commit and date."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date, as ``experiment.json`` keeps them. Nothing in them names the machine."""
    return {
        "device": device_name(device),
        "versions": {"patchkernels": version(), "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the processor with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def processor() -> str:
    """The processor's name from ``/proc/cpuinfo``, or from Python's platform module if that file has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version() -> str:
    """The version of the installed package, or ``"not installed"`` if it is only found through ``PYTHONPATH``."""
    try:
        return importlib.metadata.version("patchkernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The commit of the checkout that this package runs from, followed by ``-dirty`` if files differ from it.

    None if the package does not run from a checkout of its own. This file must be tracked by git: a virtual environment
    that holds the package may lie in the repository of another project.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
