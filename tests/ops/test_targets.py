"""Targets: the next patch, documents, weights, and the two means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_forms import BACKENDS, FORMS, check, loss_forms, normal, targets
from oracle import DEVICE, outputs_and_gradients

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_of_weight_zero_are_returned_and_change_nothing(form, backend, reduction):
    function, definition, inputs = loss_forms(backend)[form]
    target, leaves = targets(6, 3, 50), inputs(6, 50, torch.float32)
    weight = torch.tensor([0.0, -0.5, 2.0], device=DEVICE)
    if reduction != "slot_mean":
        weight = weight.repeat(6, 1)
        weight[1] = 0  # a row that is not read if its losses are not returned
    options = {"target": target, "target_weight": weight, "reduction": reduction}
    check(form, backend, 6, 50, torch.float32, **options)
    expected = outputs_and_gradients(lambda *t: function(*t, **options), *leaves)
    found = outputs_and_gradients(lambda *t: function(*t, **options, return_losses=True)[0], *leaves)
    torch.testing.assert_close(found, expected)
    losses = function(*leaves, **options, return_losses=True)[1]
    unweighted = definition(*(t.double() for t in leaves), target=target, reduction="none")
    torch.testing.assert_close(losses.double(), unweighted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss_weight": 0.01}])
@pytest.mark.parametrize("return_losses", [False, True])
def test_nan_logits_of_a_row_without_weight_change_nothing(backend, options, return_losses):
    logits, target = normal(4, 200), targets(4, 3, 200, ignored=0.0)
    weight = torch.ones(4, 3, device=DEVICE)
    weight[1] = 0

    def loss_and_gradient(z):
        leaf = z.clone().requires_grad_()
        out = patch_cross_entropy(
            leaf, target, target_weight=weight, return_losses=return_losses, backend=backend, **options
        )
        loss = out[0] if return_losses else out
        return loss, *torch.autograd.grad(loss, leaf)

    expected = loss_and_gradient(logits)
    logits[1] = torch.nan
    found = loss_and_gradient(logits)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][1].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "slot_mean"])
def test_a_mean_by_weights_that_sum_to_zero(form, reduction):
    function, _, inputs = loss_forms("eager")[form]
    leaves, target = inputs(4, 20, torch.float32), targets(4, 2, 20, ignored=0.0)[:1].repeat(4, 1)
    of_weights = lambda *weights: outputs_and_gradients(  # noqa: E731
        lambda *t: function(*t, target=target, target_weight=torch.tensor(weights), reduction=reduction), *leaves
    )
    assert all(not result.any() for result in of_weights(0.0, 0.0))
    assert not of_weights(1.0, -1.0)[0].isfinite()
    assert of_weights(float("nan"), 1.0)[0].isnan()


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
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.bool, torch.float32):  # -100 would be 156 in uint8
        with pytest.raises(TypeError, match=f"labels must be .* int32 or int64, got {dtype}"):
            next_patch_targets(torch.zeros(2, 4).to(dtype), 2)
    with pytest.raises(ValueError, match=f"ignore_index must be .* torch.int32, got {2**31}"):
        next_patch_targets(torch.zeros(2, 4, dtype=torch.int32), 2, 2**31)


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


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_weight_of_an_ignored_target_is_not_used(weight, reduction):
    logits, target = normal(2, 5), torch.tensor([[-100], [2]], device=DEVICE)
    losses = [
        patch_cross_entropy(
            logits, target, target_weight=torch.tensor([[w], [0.5]], device=DEVICE), reduction=reduction
        )
        for w in (weight, 1.0)
    ]
    assert torch.equal(*losses)


def test_numbers_that_are_no_integers_and_weights_that_are_no_tensors():
    logits, target = normal(2, 5), torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    for call, message in (
        (lambda: patch_cross_entropy(logits, target, ignore_index=1.5), "ignore_index must be an integer, got 1.5"),
        (lambda: next_patch_targets(target.T, 2, ignore_index=1.5), "ignore_index must be an integer, got 1.5"),
        (lambda: next_patch_targets(target.T, 2.0), "patch_size must be an integer, got 2.0"),
        (lambda: patch_cross_entropy(logits, target, target_weight=[1.0]), "target_weight must be a tensor, got"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
