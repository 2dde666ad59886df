"""The K-token loss in all its forms against its definition in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_forms import BACKENDS, FORMS, OPTIONS, check, loss_forms, normal, targets
from oracle import BACKEND_DTYPES, DEVICE, compare, outputs_and_gradients

from patchkernels import linear_patch_cross_entropy, patch_cross_entropy
from patchkernels.ops.targets import REDUCTIONS

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "slots", "vocab"), [(7, 4, 301), (5, 1, 128), (1, 3, 37), (3, 17, 9)])
def test_values_and_gradients(form, backend, dtype, rows, slots, vocab):
    check(form, backend, rows, vocab, dtype, targets(rows + 2, slots, vocab)[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options_and_reductions(form, backend, option, reduction):
    target = targets(6, 3, 130, ignore_index=OPTIONS[option].get("ignore_index", -100))
    check(form, backend, 6, 130, torch.float32, target, reduction=reduction, **OPTIONS[option])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_target_a_row_is_torch_cross_entropy(backend, reduction, label_smoothing):
    target, options = targets(7, 1, 40)[:, 0], {"reduction": reduction, "label_smoothing": label_smoothing}
    x, w = normal(7, 6), normal(40, 6)
    compare(lambda z: patch_cross_entropy(z, target, backend=backend, **options),
            lambda z: F.cross_entropy(z, target, **options), normal(7, 40))  # fmt: skip
    compare(lambda x, w: linear_patch_cross_entropy(x, w, target, backend=backend, **options),
            lambda x, w: F.cross_entropy(x @ w.T, target, **options), x, w)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_leading_dimensions_and_single_rows(form):
    ours, eager, inputs = loss_forms("eager")[form]
    first, *rest = inputs(6, 20, torch.float64)
    for shape, target_shape in (((2, 3, -1), (2, 3, 4)), ((2, 3, -1), (2, 3)), ((6, -1), (6,))):
        target = torch.randint(0, 20, target_shape, device=DEVICE)
        options = {"target": target, "reduction": "none"}
        compare(
            lambda t, *r, o=options: ours(t, *r, **o), lambda t, *r, o=options: eager(t, *r, **o),
            first.reshape(shape), *rest
        )  # fmt: skip
    for target in (
        torch.tensor(3, device=DEVICE),
        torch.tensor([3, 4], device=DEVICE),
    ):  # a lone row: (D) and (K)
        loss = ours(first[0], *rest, target=target, reduction="none")
        assert loss.shape == target.shape
        torch.testing.assert_close(
            loss,
            eager(first[:1], *rest, target=target.reshape(1, -1), reduction="none").reshape(target.shape),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_all_ignored_gives_zero_loss_and_zero_gradients(form, backend, reduction):
    ours, _, inputs = loss_forms(backend)[form]
    target = torch.full((4, 3), -100, device=DEVICE)
    results = outputs_and_gradients(
        lambda *leaves: ours(*leaves, target=target, reduction=reduction), *inputs(4, 30, torch.float32)
    )
    assert all(torch.equal(r, torch.zeros_like(r)) for r in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_give_zero(form, backend, reduction):
    ours, _, inputs = loss_forms(backend)[form]
    target = torch.zeros(0, 3, dtype=torch.long, device=DEVICE)
    results = outputs_and_gradients(
        lambda *leaves: ours(*leaves, target=target, reduction=reduction), *inputs(0, 30, torch.float32)
    )
    assert all(torch.equal(r, torch.zeros_like(r)) for r in results)


@given(data=st.data(), rows=st.integers(1, 6), slots=st.integers(1, 6), vocab=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("form", FORMS)
def test_any_targets_and_weights(form, data, rows, slots, vocab):
    label = st.one_of(st.just(-100), st.integers(0, vocab - 1))
    draw = lambda element: torch.tensor(  # noqa: E731
        data.draw(st.lists(st.lists(element, min_size=slots, max_size=slots), min_size=rows, max_size=rows)),
        device=DEVICE,
    )
    weight = draw(st.sampled_from([0.0, 0.25, 1.0, 3.0]))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    options = {"reduction": reduction, "target_weight": weight[0] if reduction == "slot_mean" else weight}
    check(form, "eager", rows, vocab, torch.float64, draw(label), **options)


@given(data=st.data(), slots=st.integers(1, 5), vocab=st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_any_repeated_targets_in_the_kernel(data, slots, vocab):
    label = st.sampled_from([-100, 0, vocab - 1, vocab // 2])
    target = torch.tensor([data.draw(st.lists(label, min_size=slots, max_size=slots))], device=DEVICE)
    check("logits", "triton", 1, vocab, torch.float32, target)
