"""Kernels run on the GPU if there is one and under Triton's interpreter if not; fresh memory is never zero by luck."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before any import of them

import patchkernels  # noqa: F401

# transformers imports whatever answers to "kernels"; with the package imported, the checkout may leave the path
CHECKOUT = Path(__file__).parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` is filled with NaN (or the largest integer): whatever is read unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Kernel blocks so small that small inputs have many, ragged ones."""
    kernels = pytest.importorskip("patchkernels.kernels.cross_entropy")
    monkeypatch.setattr(kernels, "MAX_BLOCK", 128)
    kernels = pytest.importorskip("patchkernels.kernels.patch_embedding")
    monkeypatch.setattr(kernels, "BLOCK_T", 8)
    monkeypatch.setattr(kernels, "TILE_T", 2)
    monkeypatch.setattr(kernels, "MAX_BLOCK_D", 16)
