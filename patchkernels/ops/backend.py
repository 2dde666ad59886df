"""The choice of the backend: Triton kernels for tensors on a GPU, PyTorch code elsewhere.

The folders ``kernels`` (Triton) and ``eager`` (PyTorch) hold the same modules with the same functions. The operators
get these modules from :func:`implementation`; no other code asks which backend runs. The one part of an operator that
is PyTorch code in both is the lookup in a table that is sharded over processes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager")
FOLDERS = {"triton": "patchkernels.kernels", "eager": "patchkernels.eager"}


def implementation(operator: str, backend: str) -> Any:
    """The module of an operator (``"patch_embedding"``, ``"cross_entropy"``) in the folder of a backend.

    It is imported on first use, because the kernels import Triton.
    """
    return importlib.import_module(f"{FOLDERS[backend]}.{operator}")


def choose_backend(backend: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """The backend, ``"triton"`` or ``"eager"``, that runs on the device of ``tensor`` and computes in ``dtype``.

    ``"auto"`` is Triton for a tensor on a GPU, where it never falls back to eager, and eager elsewhere.

    Raises:
        ValueError: an unknown name.
        RuntimeError: Triton is needed (asked for by name, or by ``"auto"`` on a GPU) and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "eager" or (backend == "auto" and tensor.device.type != "cuda"):
        return "eager"
    if not _has_triton():
        raise RuntimeError(
            f"backend={backend!r} on {tensor.device} needs triton, which is not installed "
            "(pip install triton, or pass backend='eager')"
        )
    if tensor.device.type != "cuda" and not _runs_on_cpu():
        raise RuntimeError(
            f"backend='triton' needs a tensor on a GPU, got one on {tensor.device} "
            "(TRITON_INTERPRET=1 runs the kernels interpreted)"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"backend='triton' computes in float32, bfloat16 and float16, got {dtype} (pass backend='eager')"
        )
    return "triton"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_on_cpu() -> bool:
    """Whether Triton takes tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
