"""Which implementation runs: Triton kernels on a GPU, chunked eager code elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve(backend: str, tensor: Tensor) -> str:
    """The backend, ``"triton"`` or ``"eager"``, that runs for ``tensor``.

    ``"auto"`` is Triton on a GPU and eager elsewhere; it never falls back in silence for a tensor on a GPU.

    Raises:
        ValueError: an unknown name.
        RuntimeError: Triton is needed (asked for by name, or ``"auto"`` on a GPU) and cannot run.
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
    if tensor.device.type != "cuda" and not _interpreted():
        raise RuntimeError(
            f"backend='triton' needs a tensor on a GPU, got one on {tensor.device} "
            "(TRITON_INTERPRET=1 runs the kernels interpreted)"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"backend='triton' computes in float32, bfloat16 and float16, got {tensor.dtype} (pass backend='eager')"
        )
    return "triton"
