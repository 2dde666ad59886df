"""Shared by tests of the K-token losses: every form of the loss, beside its definition in ``reference``."""

from __future__ import annotations

import torch
from oracle import DEVICE, compare

from patchkernels import linear_patch_cross_entropy, patch_cross_entropy, reference
from patchkernels.numerics import IGNORE_INDEX

BACKENDS = ("eager", "triton")
FORMS = ("logits", "linear", "linear in chunks", "low memory")
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss_weight": 0.01},
    "all": {"label_smoothing": 0.2, "softcap": 3.0, "z_loss_weight": 0.001, "ignore_index": 5},
}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def targets(rows: int, slots: int, vocab: int, ignored: float = 0.3, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Random targets: some ignored, some repeated within a row, one row without a valid target."""
    t = torch.randint(0, vocab, (rows, slots))
    t[rows // 3] = t[rows // 3, 0]
    t = torch.where(torch.rand(rows, slots) < ignored, ignore_index, t)
    t[rows // 2] = ignore_index
    return t.to(DEVICE)


def loss_forms(backend: str):
    """For each form: our function, its definition in ``reference``, and a function that draws the inputs of both."""
    whole = {"backend": backend}
    fused = {"logits_bytes": 700, **whole}  # a few rows per chunk, a few classes per slice
    linear_inputs = lambda rows, vocab, dtype: [  # noqa: E731
        normal(rows, 6, dtype=dtype),
        normal(vocab, 6, dtype=dtype),
        normal(vocab, dtype=dtype),
    ]
    return {
        "logits": (
            lambda z, **o: patch_cross_entropy(z, backend=backend, **o),
            reference.patch_cross_entropy,
            lambda rows, vocab, dtype: [2 * normal(rows, vocab, dtype=dtype)],
        ),
        "linear": (
            lambda x, w, b, **o: linear_patch_cross_entropy(x, w, linear_bias=b, **whole, **o),
            lambda x, w, b, **o: reference.linear_patch_cross_entropy(x, w, linear_bias=b, **o),
            linear_inputs,
        ),
        "linear in chunks": (
            lambda x, w, b, **o: linear_patch_cross_entropy(x, w, linear_bias=b, **fused, **o),
            lambda x, w, b, **o: reference.linear_patch_cross_entropy(x, w, linear_bias=b, **o),
            linear_inputs,
        ),
        "low memory": (
            lambda x, w, b, **o: linear_patch_cross_entropy(x, w, linear_bias=b, memory="low", **fused, **o),
            lambda x, w, b, **o: reference.linear_patch_cross_entropy(x, w, linear_bias=b, **o),
            linear_inputs,
        ),
    }


def check(form, backend, rows, vocab, dtype, target, **options):
    ours, eager, inputs = loss_forms(backend)[form]
    compare(
        lambda *leaves: ours(*leaves, target=target, **options),
        lambda *leaves: eager(*leaves, target=target, **options),
        *inputs(rows, vocab, dtype),
    )
