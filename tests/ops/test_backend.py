"""The right backend runs, and both backends have the same functions."""

from __future__ import annotations

import inspect

import pytest
import torch

from patchkernels import linear_patch_cross_entropy
from patchkernels.ops.backend import implementation

X, W, T = torch.randn(4, 6), torch.randn(30, 6), torch.zeros(4, 2, dtype=torch.long)


def test_a_backend_asked_for_by_name_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on a GPU, got one on cpu"):
        linear_patch_cross_entropy(X, W, T, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="float64"):
        linear_patch_cross_entropy(X.double(), W.double(), T, backend="triton")
    monkeypatch.setattr("patchkernels.ops.backend._has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        linear_patch_cross_entropy(X, W, T, backend="triton")


def functions_of(module):
    """The public functions of a backend's module, with their signatures."""
    public = {name: value for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"}
    names = getattr(module, "__all__", [n for n, f in public.items() if f.__module__ == module.__name__])
    return {name: inspect.signature(public[name]) for name in names}


@pytest.mark.parametrize(
    ("operator", "of_kernels_alone"),
    [
        ("patch_embedding", {"launch_config"}),
        ("cross_entropy", {"launch_config", "programs_at_a_time", "softcap_kind"}),
        ("scaling", set()),
        ("targets", {"launch_config"}),
    ],
)
def test_both_backends_offer_the_same_functions(operator, of_kernels_alone):
    pytest.importorskip("triton")
    eager, kernels = (functions_of(implementation(operator, backend)) for backend in ("eager", "triton"))
    assert kernels.keys() - eager.keys() == of_kernels_alone
    assert {name: kernels[name] for name in eager} == eager
