"""The modules: parameters, names and results of those that they replace."""

from __future__ import annotations

import pytest
import torch

from patchkernels import PatchEmbedding, PatchLMHead, reference

X, T = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.long)


def test_module_has_the_parameters_of_embedding_and_a_patch_size_that_may_change():
    theirs = torch.nn.Embedding(10, 6, padding_idx=3)
    ours = PatchEmbedding(10, 6, padding_idx=3)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 10, (2, 8))
    assert torch.equal(ours(ids), theirs(ids))
    ours.patch_size = 4
    torch.testing.assert_close(ours(ids), reference.patch_embedding(ids, theirs.weight, 4, padding_idx=3))
    assert ours(ids, patch_size=2).shape == (2, 4, 6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PatchEmbedding(10, 6, 0)


def test_head_module_gives_logits_or_loss():
    theirs, ours = torch.nn.Linear(6, 30), PatchLMHead(6, 30, bias=True)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(X), theirs(X))
    torch.testing.assert_close(
        ours(X, T, reduction="sum", label_smoothing=0.1),
        reference.patch_cross_entropy(theirs(X), T, reduction="sum", label_smoothing=0.1),
    )
    with pytest.raises(ValueError, match="reduction"):
        ours(X, reduction="sum")
