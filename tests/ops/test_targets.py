"""Targets: the next patch, documents, weights, and the two means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_forms import BACKENDS, FORMS, check, normal, targets
from oracle import DEVICE

from patchkernels import next_patch_targets, patch_cross_entropy
from patchkernels.ops.targets import REDUCTIONS, mask_document_starts

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_row", [False, True])
def test_target_weight(form, backend, reduction, per_row):
    target = targets(6, 3, 50)
    weight = torch.rand(6, 3, device=DEVICE) if per_row else torch.rand(3, device=DEVICE)
    weight[..., 1] = 0  # a target of weight 0 is ignored
    if per_row and reduction == "slot_mean":
        with pytest.raises(ValueError, match=r"slot_mean.*\(3,\).*\(6, 3\)"):
            check(form, backend, 6, 50, torch.float32, target, reduction=reduction, target_weight=weight)
    else:
        check(form, backend, 6, 50, torch.float32, target, reduction=reduction, target_weight=weight)


def test_two_means_agree_where_nothing_is_ignored_and_differ_where_something_is():
    logits, target = normal(6, 20), targets(6, 3, 20, ignored=0.0)[:3]
    mean, slot = (patch_cross_entropy(logits[:3], target, reduction=r) for r in ("mean", "slot_mean"))
    torch.testing.assert_close(mean, slot)
    target[0, 0] = target[1, 0] = -100
    mean, slot = (patch_cross_entropy(logits[:3], target, reduction=r) for r in ("mean", "slot_mean"))
    assert abs(mean - slot) > 1e-3


@given(batch=st.integers(1, 3), patches=st.integers(1, 6), patch_size=st.integers(1, 5))
def test_next_patch_targets(batch, patches, patch_size):
    labels = torch.arange(batch * patches * patch_size).reshape(batch, -1)
    out = next_patch_targets(labels, patch_size, ignore_index=-7)
    assert out.shape == (batch, patches, patch_size)
    for b in range(batch):
        for p in range(patches):
            for k in range(patch_size):
                expected = labels[b, (p + 1) * patch_size + k] if p + 1 < patches else -7
                assert out[b, p, k] == expected


def test_bad_labels():
    with pytest.raises(ValueError, match=r"\(2, 5\) and patch_size=2"):
        next_patch_targets(torch.zeros(2, 5), 2)
    with pytest.raises(ValueError, match="got 0"):
        next_patch_targets(torch.zeros(2, 4), 0)


@pytest.mark.parametrize("shared", [False, True])
def test_no_document_predicts_the_first_patch_of_the_next(shared):
    target = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    begins = torch.tensor([[True, False, True, False, True], [True, True, False, False, False]])
    begins = begins[:1] if shared else begins
    masked = mask_document_starts(target, begins)
    for b, row in enumerate(begins.expand(2, -1).tolist()):
        for p in range(5):
            ignored = p < 4 and row[p + 1]
            assert torch.equal(masked[b, p], torch.full((3,), -100) if ignored else target[b, p])
