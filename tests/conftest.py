"""Settings of every test: Triton's interpreter without a GPU, memory that is never zero by chance, a fixed seed."""

from __future__ import annotations

import os

import pytest
import torch
from checkout import leave_checkout

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when kernels are defined, so it is set before the import

import patchkernels  # noqa: F401

leave_checkout()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` is filled with NaN (or the largest integer), so that reading unwritten memory is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes kernel blocks so small that small inputs are cut into several, of which the last is not full."""
    kernels = pytest.importorskip("patchkernels.kernels.cross_entropy")
    monkeypatch.setattr(kernels, "MAX_BLOCK", 128)
    kernels = pytest.importorskip("patchkernels.kernels.patch_embedding")
    monkeypatch.setattr(kernels, "BLOCK_T", 8)
    monkeypatch.setattr(kernels, "TILE_T", 2)
    monkeypatch.setattr(kernels, "MAX_BLOCK_D", 16)
