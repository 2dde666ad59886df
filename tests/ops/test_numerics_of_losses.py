"""The numerical guarantees of every form of the K-token loss, one test for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_forms import BACKENDS, FORMS, loss_forms, normal, targets
from oracle import DEVICE, compare, outputs_and_gradients, relative_error

from patchkernels import linear_patch_cross_entropy, patch_cross_entropy, reference
from patchkernels.ops.targets import REDUCTIONS

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_and_loss_are_fp32(backend):
    """The bf16 logits of 30000 classes are equal, so that a sum of exp in bf16 would not grow beyond 256."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(1, 30000, dtype=dtype, device=DEVICE)
        loss = patch_cross_entropy(logits, torch.tensor([[0, 1]], device=DEVICE), backend=backend)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.item(), torch.tensor(30000.0).log().item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("repeated", [False, True])
def test_gradient_at_a_certain_target_is_formed_before_rounding(backend, repeated):
    """p is near 1 and rounds to 1 in bf16, so that p - 1 after rounding would be 0 instead of about -6e-4."""
    logits = torch.zeros(1, 200, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 7] = 12.5
    target = torch.full((1, 3 if repeated else 1), 7, device=DEVICE)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(patch_cross_entropy(logits, target, backend=backend), logits)
    exact = torch.softmax(logits.detach().double(), -1)[0, 7] - 1
    assert -1e-3 < exact < -1e-4
    torch.testing.assert_close(gradient[0, 7].double(), exact, rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_callers_tensors_are_never_overwritten_and_a_second_backward_is_the_first(form, backend):
    ours, _, inputs = loss_forms(backend)[form]
    leaves = [t.requires_grad_() for t in inputs(5, 30, torch.float32)]
    target, weight = targets(5, 2, 30), torch.rand(5, 2, device=DEVICE)
    before = [t.detach().clone() for t in (*leaves, target, weight)]
    loss = ours(*leaves, target=target, target_weight=weight)
    upstream = torch.tensor(3.0, device=DEVICE)
    first, second = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert upstream == 3
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, target, weight), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_a_constant_added_to_all_logits_of_a_row_costs_no_digits(form, backend, options, offset):
    """log-sum-exp rounded near 1e6 would be off by 0.03. All logits are fp32 numbers, so that no product rounds."""
    x, weight = torch.randint(-2, 3, (7, 6)).to(DEVICE, torch.float32), torch.randint(-8, 9, (301, 6)).to(DEVICE) / 8
    bias, target = offset + torch.randint(-8, 9, (301,)).to(DEVICE) / 8, targets(7, 3, 301)
    function, _, _ = loss_forms(backend)[form]
    rows, classes = (target != -100).nonzero(as_tuple=True)[0], target[target != -100]
    plain = lambda z: F.cross_entropy(z[rows], classes, **options)  # noqa: E731
    ours = lambda *leaves: function(*leaves, target=target, **options)  # noqa: E731
    if form == "logits":
        compare(ours, plain, F.linear(x, weight, bias))
    else:
        compare(ours, lambda *leaves: plain(F.linear(*leaves)), x, weight, bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 100.0}, {"z_loss_weight": 1e-5}])
def test_fp16_logits_of_ten_thousands(form, options):
    target, leaves = targets(6, 2, 64), [60 * normal(6, 4).half(), 60 * normal(64, 4).half()]
    function, definition, _ = loss_forms("triton")[form]
    if form == "logits":
        leaves = [leaves[0] @ leaves[1].T]
    else:
        leaves.append(torch.zeros(64, dtype=torch.float16, device=DEVICE))
    exact = [t.double() for t in leaves]
    assert 1e4 < F.linear(*exact).abs().max() < 65504 if form != "logits" else exact[0].abs().max() > 1e4
    for value, expected in zip(
        outputs_and_gradients(lambda *t: function(*t, target=target, **options), *leaves),
        outputs_and_gradients(lambda *t: definition(*t, target=target, **options), *exact),
        strict=True,
    ):
        assert relative_error(value, expected) < 0.02  # the logits themselves are rounded to 11 bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [1e-3, 30.0, 100.0, 101.0, 1e5, 1e30])
def test_soft_caps_of_every_size(form, dtype, softcap):
    """Logits from far below the cap to far above it. Eager code rounds in fp32 too, after exact logits of the dtype."""
    size = min(softcap, 10.0)
    target, leaves = targets(6, 3, 70), [size * normal(6, 5), normal(70, 5)]
    function, definition, _ = loss_forms("triton")[form]
    if form == "logits":
        leaves = [leaves[0] @ leaves[1].T]
    else:
        leaves.append(torch.zeros(70, device=DEVICE))
    leaves = [leaf.to(dtype) for leaf in leaves]
    exact = [leaf.double() for leaf in leaves]
    for value, expected in zip(
        outputs_and_gradients(lambda *t: function(*t, target=target, softcap=softcap), *leaves),
        outputs_and_gradients(lambda *t: definition(*t, target=target, softcap=softcap), *exact),
        strict=True,
    ):
        assert relative_error(value, expected) < (2e-2 if dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [33, 40, 129])
@pytest.mark.parametrize("softcap", [3.0, 1000.0])
def test_a_soft_cap_sees_nothing_of_the_padding(dtype, vocab, softcap):
    """Rows end before an aligned address, and what follows may be read."""
    padded = torch.full((4, 144), torch.nan, device=DEVICE, dtype=dtype)
    padded[:, :vocab] = normal(4, vocab)
    target = targets(4, 2, vocab)
    results = []
    for logits in (padded[:, :vocab], padded[:, :vocab].contiguous()):
        logits.requires_grad_()
        losses = patch_cross_entropy(logits, target, softcap=softcap, reduction="none", backend="triton")
        results.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    torch.testing.assert_close(*results)
    assert not any(t.isnan().any() for t in results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_rows_at_all(dtype):
    logits = torch.zeros(0, 7, dtype=dtype, device=DEVICE, requires_grad=True)
    patch_cross_entropy(logits, torch.zeros(0, 2, dtype=torch.long, device=DEVICE), reduction="sum").backward()
    assert logits.grad.shape == (0, 7)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_many_targets_with_a_strong_z_loss_do_not_overflow_in_fp16(memory):
    """Their weights add up in a row's gradient, which is multiplied by ``1 + 2 z_loss_weight lse``."""
    x = torch.tensor([3000.0, 0.0], dtype=torch.float16, device=DEVICE)
    head = torch.eye(2, dtype=torch.float16, device=DEVICE)
    target = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    loss = linear_patch_cross_entropy(x.requires_grad_(), head, target, z_loss_weight=1.0, memory=memory)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.tolist() == [6000.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_no_value_is_read_back_on_the_way(form, monkeypatch):
    """Our code calls no `.item()` or the like with the Triton backend, since these would synchronise a GPU."""
    import sys

    ours, _, inputs = loss_forms("triton")[form]
    leaves = [t.requires_grad_() for t in inputs(5, 30, torch.float32)]
    target = targets(5, 2, 30)
    caught = []
    for name in (
        "item",
        "tolist",
        "nonzero",
        "cpu",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    ):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, name=name, original=original, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if "patchkernels" in caller or "/kernels/" in caller:
                caught.append((name, caller))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    for reduction in REDUCTIONS:
        loss = ours(*leaves, target=target, reduction=reduction)
        torch.autograd.grad(loss.sum(), leaves)
    assert caught == []


def test_offsets_past_32_bits(tmp_path):
    """Row 5 of stride 2^29 begins past element 2^31. The file is sparse, and only the rows' few pages are touched."""
    vocab, stride, rows = 40, 2**29, 6
    if DEVICE == "cpu":
        storage = torch.from_file(
            str(tmp_path / "sparse"), shared=True, size=stride * (rows - 1) + vocab, dtype=torch.bfloat16
        )
    else:
        storage = torch.empty(stride * (rows - 1) + vocab, dtype=torch.bfloat16, device=DEVICE)
    logits = storage.as_strided((rows, vocab), (stride, 1))
    logits.copy_(normal(rows, vocab))
    target = torch.randint(0, vocab, (rows, 2), device=DEVICE)
    loss = patch_cross_entropy(logits, target, reduction="none", backend="triton")
    expected = reference.patch_cross_entropy(logits.clone().double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_target_out_of_range_raises_on_cpu(form, bad):
    ours, _, inputs = loss_forms("eager")[form]
    target = torch.tensor([[1, bad], [-100, 2]])
    with pytest.raises(IndexError, match=rf"\[0, 30\).*got {bad}"):
        ours(*(t.cpu() for t in inputs(2, 30, torch.float32)), target=target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_target_out_of_range_gives_nan_in_the_kernel(form, bad):
    ours, _, inputs = loss_forms("triton")[form]
    target = torch.tensor([[1, bad], [-100, 2]], device=DEVICE)
    loss = ours(*inputs(2, 30, torch.float32), target=target, reduction="none")
    assert loss.isnan().tolist() == [[False, True], [False, False]]
    assert ours(*inputs(2, 30, torch.float32), target=target).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_masks_a_class(backend):
    logits, target = normal(3, 300), torch.tensor([[1, 2]] * 3, device=DEVICE)
    logits[:, 100:] = -torch.inf
    logits[:, 0] = -torch.inf
    compare(
        lambda z: patch_cross_entropy(z, target, backend=backend),
        lambda z: reference.patch_cross_entropy(z, target),
        logits,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    target = targets(10, 6, 30)[::2, 1::2]
    storage = normal(33, 17)
    for view in (storage[1:31, 2:7].T, storage[5:10, 1:], storage[:5].expand(5, 17)):
        layout = (view.shape, view.stride(), view.storage_offset())
        t = torch.where(target < view.shape[1], target, -100)
        compare(
            lambda s, at=layout, t=t: patch_cross_entropy(s.as_strided(*at), t, backend=backend),
            lambda s, at=layout, t=t: reference.patch_cross_entropy(s.as_strided(*at), t),
            storage,
        )
    compare(
        lambda x, w: linear_patch_cross_entropy(x.T, w.T[::2], target[:5], backend=backend),
        lambda x, w: reference.linear_patch_cross_entropy(x.T, w.T[::2], target[:5]),
        normal(8, 5),
        normal(8, 60),
    )
