"""The modules have the parameters, names and results of the modules that they replace."""

from __future__ import annotations

import pytest
import torch

from patchkernels import PatchEmbedding, PatchLMHead, reference

X, T = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.long)


def test_module_has_the_parameters_of_embedding_and_a_patch_size_that_may_change():
    plain = torch.nn.Embedding(10, 6, padding_idx=3)
    embedding = PatchEmbedding(10, 6, padding_idx=3)
    embedding.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 10, (2, 8))
    assert torch.equal(embedding(ids), plain(ids))
    embedding.patch_size = 4
    torch.testing.assert_close(embedding(ids), reference.patch_embedding(ids, plain.weight, 4, padding_idx=3))
    assert embedding(ids, patch_size=2).shape == (2, 4, 6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PatchEmbedding(10, 6, 0)


def test_head_module_gives_logits_or_loss():
    plain, head = torch.nn.Linear(6, 30), PatchLMHead(6, 30, bias=True)
    head.load_state_dict(plain.state_dict())
    assert torch.equal(head(X), plain(X))
    torch.testing.assert_close(
        head(X, T, reduction="sum", label_smoothing=0.1),
        reference.patch_cross_entropy(plain(X), T, reduction="sum", label_smoothing=0.1),
    )
    with pytest.raises(ValueError, match="reduction"):
        head(X, reduction="sum")
