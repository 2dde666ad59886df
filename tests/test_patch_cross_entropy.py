"""Operator 2, on given logits and with the head fused in, against its eager definition in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICE, ENGINES, compare, outputs_and_gradients

from patchkernels import (
    PatchLMHead,
    linear_patch_cross_entropy,
    next_patch_targets,
    patch_cross_entropy,
    reference,
)
from patchkernels.linear_patch_cross_entropy import MEMORIES
from patchkernels.patch_cross_entropy import REDUCTIONS

pytestmark = pytest.mark.usefixtures("small_blocks")

BACKENDS = ("eager", "triton")
FORMS = ("logits", "linear", "low memory")
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss_weight": 0.01},
    "all": {"label_smoothing": 0.2, "softcap": 3.0, "z_loss_weight": 0.001, "ignore_index": 5},
}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def targets(rows: int, slots: int, vocab: int, ignored: float = 0.3, ignore_index: int = -100) -> torch.Tensor:
    """Some ignored, some repeated within a row, one row with nothing valid."""
    t = torch.randint(0, vocab, (rows, slots))
    t[rows // 3] = t[rows // 3, 0]
    t = torch.where(torch.rand(rows, slots) < ignored, ignore_index, t)
    t[rows // 2] = ignore_index
    return t.to(DEVICE)


def both_operators(backend: str):
    """(name, ours, reference, inputs' shapes): the same test for both forms of operator 2."""
    fused = {"logits_bytes": 700, "backend": backend}  # a few rows a chunk, a few classes a slice
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
    ours, eager, inputs = both_operators(backend)[form]
    compare(
        lambda *leaves: ours(*leaves, target=target, **options),
        lambda *leaves: eager(*leaves, target=target, **options),
        *inputs(rows, vocab, dtype),
    )


@pytest.mark.parametrize(("backend", "dtype"), ENGINES)
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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_row", [False, True])
def test_target_weight(form, backend, reduction, per_row):
    target = targets(6, 3, 50)
    weight = torch.rand(6, 3, device=DEVICE) if per_row else torch.rand(3, device=DEVICE)
    weight[..., 1] = 0  # a weight of 0 is an ignored target
    if per_row and reduction == "slot_mean":
        with pytest.raises(ValueError, match=r"slot_mean.*\(3,\).*\(6, 3\)"):
            check(form, backend, 6, 50, torch.float32, target, reduction=reduction, target_weight=weight)
    else:
        check(form, backend, 6, 50, torch.float32, target, reduction=reduction, target_weight=weight)


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
    ours, eager, inputs = both_operators("eager")[form]
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


def test_two_means_agree_where_nothing_is_ignored_and_differ_where_something_is():
    logits, target = normal(6, 20), targets(6, 3, 20, ignored=0.0)[:3]
    mean, slot = (patch_cross_entropy(logits[:3], target, reduction=r) for r in ("mean", "slot_mean"))
    torch.testing.assert_close(mean, slot)
    target[0, 0] = target[1, 0] = -100
    mean, slot = (patch_cross_entropy(logits[:3], target, reduction=r) for r in ("mean", "slot_mean"))
    assert abs(mean - slot) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_all_ignored_gives_zero_loss_and_zero_gradients(form, backend, reduction):
    ours, _, inputs = both_operators(backend)[form]
    target = torch.full((4, 3), -100, device=DEVICE)
    results = outputs_and_gradients(
        lambda *leaves: ours(*leaves, target=target, reduction=reduction), *inputs(4, 30, torch.float32)
    )
    assert all(torch.equal(r, torch.zeros_like(r)) for r in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_give_zero(form, backend, reduction):
    ours, _, inputs = both_operators(backend)[form]
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


# design of the numerics: one test for each point


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_and_loss_are_fp32(backend):
    """bf16 logits of 30000 equal classes: a bf16 sum of exp would stall at 256."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(1, 30000, dtype=dtype, device=DEVICE)
        loss = patch_cross_entropy(logits, torch.tensor([[0, 1]], device=DEVICE), backend=backend)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.item(), torch.tensor(30000.0).log().item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_head_gradient_is_summed_over_chunks_in_fp32_and_cast_once(backend, memory):
    x, w = normal(64, 8, dtype=torch.bfloat16), normal(40, 8, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(0, 40, (64, 4), device=DEVICE)
    gradients = []
    for logits_bytes in (2**20, 2 * 48 * 2):  # one chunk, chunks of two rows
        loss = linear_patch_cross_entropy(x, w, target, logits_bytes=logits_bytes, backend=backend, memory=memory)
        gradients += torch.autograd.grad(loss, w)
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=1e-6)  # at most one step of bf16 apart


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("repeated", [False, True])
def test_gradient_at_a_certain_target_is_formed_before_rounding(backend, repeated):
    """p -> 1: in bf16 p rounds to 1, and p - 1 formed after rounding would be 0 instead of -6e-4 and the like."""
    logits = torch.zeros(1, 200, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 7] = 12.5
    target = torch.full((1, 3 if repeated else 1), 7, device=DEVICE)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(patch_cross_entropy(logits, target, backend=backend), logits)
    exact = torch.softmax(logits.detach().double(), -1)[0, 7] - 1
    assert -1e-3 < exact < -1e-4
    torch.testing.assert_close(gradient[0, 7].double(), exact, rtol=2**-7, atol=0)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_of_a_mean_over_many_rows_do_not_vanish(backend, memory):
    """Each row's dlogits are 1 / N of what they are alone, below fp16's smallest number, if formed after the mean."""
    x, w = normal(4096, 4, dtype=torch.float16).requires_grad_(), normal(16, 4, dtype=torch.float16)
    target = torch.randint(0, 16, (4096, 1), device=DEVICE)
    backend = "eager" if DEVICE == "cpu" else backend
    loss = linear_patch_cross_entropy(x, w, target, backend=backend, memory=memory) * 2.0**14
    (gradient,) = torch.autograd.grad(loss, x)
    xd = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.linear_patch_cross_entropy(xd, w.double(), target) * 2.0**14, xd)
    assert (gradient.double() - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_input_weight_or_bias(backend, reduction, frozen, memory):
    leaves = [normal(5, 6), normal(30, 6), normal(30)]
    target = targets(5, 2, 30)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def gradients(function, **kwargs):
        loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction, **kwargs)
        return torch.autograd.grad(loss, wanted, torch.full_like(loss, 3.0))

    ours = gradients(linear_patch_cross_entropy, backend=backend, memory=memory, logits_bytes=700)
    torch.testing.assert_close(ours, gradients(reference.linear_patch_cross_entropy))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_callers_tensors_are_never_overwritten_and_a_second_backward_is_the_first(form, backend):
    ours, _, inputs = both_operators(backend)[form]
    leaves = [t.requires_grad_() for t in inputs(5, 30, torch.float32)]
    target, weight = targets(5, 2, 30), torch.rand(5, 2, device=DEVICE)
    before = [t.detach().clone() for t in (*leaves, target, weight)]
    loss = ours(*leaves, target=target, target_weight=weight)
    upstream = torch.tensor(3.0, device=DEVICE)
    first, second = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert upstream == 3
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, target, weight), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_no_value_is_read_back_on_the_way(form, monkeypatch):
    """`.item()` and its kin, called from our code with the Triton backend, would synchronise a GPU."""
    import sys

    ours, _, inputs = both_operators("triton")[form]
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


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("reduction", ["mean", "slot_mean", "sum"])
def test_inside_a_cuda_graph(reduction):
    x, w, target = normal(64, 32).requires_grad_(), normal(100, 32).requires_grad_(), targets(64, 4, 100)

    def step():
        loss = linear_patch_cross_entropy(x, w, target, reduction=reduction)
        return loss, *torch.autograd.grad(loss, (x, w))

    expected = step()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, expected)


@pytest.mark.parametrize("form", ["linear", "low memory"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 50257), (2, 50257)])
def test_odd_vocabulary_and_single_rows(form, rows, vocab):
    check(form, "triton", rows, vocab, torch.bfloat16, targets(3, 4, vocab)[:rows])


def test_offsets_past_32_bits(tmp_path):
    """Row 5 of stride 2^29 begins past element 2^31; the file is sparse, and only the rows' few pages are touched."""
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
    ours, _, inputs = both_operators("eager")[form]
    target = torch.tensor([[1, bad], [-100, 2]])
    with pytest.raises(IndexError, match=rf"\[0, 30\).*got {bad}"):
        ours(*(t.cpu() for t in inputs(2, 30, torch.float32)), target=target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_target_out_of_range_gives_nan_in_the_kernel(form, bad):
    ours, _, inputs = both_operators("triton")[form]
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


X, W, T = torch.randn(4, 6), torch.randn(30, 6), torch.zeros(4, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": T[:3]}, ValueError, r"\(3, 2\) for input \(4, 6\)"),
        ({"target": T[:, :, None]}, ValueError, r"\(4, 2, 1\)"),
        ({"target": T[:, :0]}, ValueError, "at least one label"),
        ({"target": T.float()}, TypeError, "torch.float32"),
        ({"target": T.to("meta")}, ValueError, "meta"),
        ({"input": X.long()}, TypeError, "floating point"),
        ({"input": torch.tensor(1.0)}, ValueError, r"got"),
        ({"linear_weight": W[:, :5]}, ValueError, r"\(30, 5\) for input \(4, 6\)"),
        ({"linear_weight": W[0]}, ValueError, r"\(6,\)"),
        ({"linear_weight": W.double()}, ValueError, "torch.float64"),
        ({"linear_weight": W.to("meta")}, ValueError, "meta"),
        ({"linear_weight": W[:0]}, ValueError, "at least one class"),
        ({"linear_bias": torch.zeros(29)}, ValueError, r"\(30,\), got \(29,\)"),
        ({"target_weight": torch.ones(3)}, ValueError, r"\(2,\) or \(4, 2\), got \(3,\)"),
        ({"target_weight": torch.ones(2, requires_grad=True)}, ValueError, "requires grad"),
        ({"target_weight": torch.ones(2, device="meta")}, ValueError, "meta"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "1.5"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ({"z_loss_weight": -1.0}, ValueError, "-1.0"),
        ({"logits_bytes": 0}, ValueError, "got 0"),
        ({"memory": "none"}, ValueError, "'none'"),
        ({"backend": "cuda"}, ValueError, "'cuda'"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        linear_patch_cross_entropy(**{"input": X, "linear_weight": W, "target": T, **changes})


def test_bad_labels():
    with pytest.raises(ValueError, match=r"\(2, 5\) and patch_size=2"):
        next_patch_targets(torch.zeros(2, 5), 2)
    with pytest.raises(ValueError, match="got 0"):
        next_patch_targets(torch.zeros(2, 4), 0)


def test_a_backend_asked_for_by_name_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on a GPU, got one on cpu"):
        linear_patch_cross_entropy(X, W, T, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="float64"):
        linear_patch_cross_entropy(X.double(), W.double(), T, backend="triton")
    monkeypatch.setattr("patchkernels.backend._has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        linear_patch_cross_entropy(X, W, T, backend="triton")


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


@pytest.mark.parametrize("reduction", ["mean", "slot_mean", "sum", "none"])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_losses_that_were_reduced_are_returned(reduction, memory):
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    target = torch.randint(0, 11, (2, 5, 3))
    target[0, :2, 1] = -100
    slots = torch.tensor([1.0, 2.0, 0.5])
    expected = reference.patch_cross_entropy(x @ weight.T, target, reduction="none")
    for needed in (False, True):
        options = {"target_weight": slots, "reduction": reduction, "return_losses": True}
        given = x.clone().requires_grad_(needed)
        loss, losses = linear_patch_cross_entropy(given, weight, target, memory=memory, **options)
        torch.testing.assert_close(losses, expected)
        assert not losses.requires_grad and loss.requires_grad == needed
        _, losses = patch_cross_entropy(given @ weight.T, target, **options)
        torch.testing.assert_close(losses, expected)
