"""The loss with the head fused in: the gradient of the head, frozen tensors, CUDA graphs, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from loss_forms import BACKENDS, check, normal, targets
from oracle import DEVICE

from patchkernels import linear_patch_cross_entropy, patch_cross_entropy, reference
from patchkernels.ops.linear_patch_cross_entropy import MEMORIES
from patchkernels.ops.targets import REDUCTIONS

pytestmark = pytest.mark.usefixtures("small_blocks")

INFINITY, NAN = float("inf"), float("nan")
X, W, T = torch.randn(4, 6), torch.randn(30, 6), torch.zeros(4, 2, dtype=torch.long)


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


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_of_a_mean_over_many_rows_do_not_vanish(backend, memory):
    """The mean divides each row's dlogits by N, which would take them below the smallest number of fp16."""
    x, w = normal(4096, 4, dtype=torch.float16).requires_grad_(), normal(16, 4, dtype=torch.float16)
    target = torch.randint(0, 16, (4096, 1), device=DEVICE)
    backend = "eager" if DEVICE == "cpu" else backend
    loss = linear_patch_cross_entropy(x, w, target, backend=backend, memory=memory) * 2.0**14
    (gradient,) = torch.autograd.grad(loss, x)
    xd = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.linear_patch_cross_entropy(xd, w.double(), target) * 2.0**14, xd)
    assert (gradient.double() - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("logits_bytes", [None, 5000])
@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_gradients_under_autocast_for_any_dtypes(autocast, dtypes, logits_bytes):
    """With an upstream gradient as GradScaler's, by which the input alone would overflow in fp16."""
    x, w = normal(64, 16).to(dtypes[0]), (normal(200, 16) * 1e-3).to(dtypes[1])
    target = torch.randint(0, 200, (64, 2), device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    with torch.autocast(DEVICE, autocast):
        loss = linear_patch_cross_entropy(*leaves, target, logits_bytes=logits_bytes)
    upstream = torch.tensor(65536.0, device=DEVICE)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    exact = [t.double().requires_grad_() for t in (x, w)]
    expected = torch.autograd.grad(reference.linear_patch_cross_entropy(*exact, target), exact, upstream.double())
    for gradient, right, dtype in zip(gradients, expected, dtypes):
        assert gradient.dtype == dtype
        assert (gradient.double() - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("memory", MEMORIES)
def test_fp16_head_gradients_of_a_mean_over_many_rows_do_not_overflow(memory):
    """The sum over 16384 rows of hidden states about 8 is beyond fp16's 65504, their mean is of order 8."""
    x = (8 + 0.1 * normal(16384, 4)).half()
    weight = (normal(64, 4) / 100).half().requires_grad_()  # all classes are about equally likely
    target = torch.zeros(16384, 8, dtype=torch.long)
    loss = linear_patch_cross_entropy(x, weight, target.to(DEVICE), memory=memory)
    (gradient,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().double().requires_grad_()
    reference.linear_patch_cross_entropy(x.double(), exact, target.to(DEVICE)).backward()
    assert (gradient.double() - exact.grad).norm() < 2e-3 * exact.grad.norm()


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
        ({"softcap": INFINITY}, ValueError, "got inf; .* 1e-30 to 1e[+]30"),
        ({"softcap": NAN}, ValueError, "softcap must be positive, got nan"),
        ({"softcap": 1e39}, ValueError, "softcap must be positive, got 1e[+]39"),
        ({"softcap": 1e-39}, ValueError, "softcap must be positive, got 1e-39"),
        ({"z_loss_weight": -1.0}, ValueError, "-1.0"),
        ({"z_loss_weight": INFINITY}, ValueError, "must be finite, got inf"),
        ({"z_loss_weight": NAN}, ValueError, "must be finite, got nan"),
        ({"label_smoothing": NAN}, ValueError, "label_smoothing .* got nan"),
        ({"input": X.to(torch.float8_e4m3fn)}, TypeError, "input must be floating point.*got torch.float8_e4m3fn"),
        ({"input": X.cfloat()}, TypeError, "got torch.complex64"),
        ({"linear_weight": W.to(torch.float8_e5m2)}, TypeError, "linear_weight must be .*got torch.float8_e5m2"),
        ({"linear_bias": torch.zeros(30, dtype=torch.int64)}, TypeError, "linear_bias must be .*got torch.int64"),
        ({"target_weight": torch.ones(2, dtype=torch.cfloat)}, TypeError, "target_weight must be real"),
        ({"ignore_index": 2**63}, ValueError, f"ignore_index must be .*torch.int64, got {2**63}"),
        ({"logits_bytes": math.inf}, TypeError, "logits_bytes must be an integer, got inf"),
        ({"target": T.int(), "ignore_index": 2**31}, ValueError, f"ignore_index must be .*torch.int32, got {2**31}"),
        ({"logits_bytes": 0}, ValueError, "got 0"),
        ({"memory": "none"}, ValueError, "'none'"),
        ({"backend": "cuda"}, ValueError, "'cuda'"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"input": X, "linear_weight": W, "target": T, **changes}
    for backend in ("eager", "triton") if "backend" not in changes else (changes["backend"],):
        with pytest.raises(error, match=message):
            linear_patch_cross_entropy(**{**arguments, "backend": backend})
    if not {"linear_weight", "linear_bias", "logits_bytes", "memory"} & set(changes) and arguments["input"].ndim:
        del arguments["linear_weight"]
        with pytest.raises(error, match=message):
            patch_cross_entropy(**arguments)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hidden_states_without_columns_give_equal_logits(backend, memory, reduction):
    x, weight = normal(4, 0).requires_grad_(), normal(30, 0).requires_grad_()
    loss = linear_patch_cross_entropy(x, weight, T.to(DEVICE), memory=memory, backend=backend, reduction=reduction)
    factor = 8 if reduction == "sum" else 1
    torch.testing.assert_close(loss, torch.full_like(loss, 30.0).log() * factor)
    assert [g.shape for g in torch.autograd.grad(loss.sum(), (x, weight))] == [(4, 0), (30, 0)]


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
        leaf = x.clone().requires_grad_(needed)
        loss, losses = linear_patch_cross_entropy(leaf, weight, target, memory=memory, **options)
        torch.testing.assert_close(losses, expected)
        assert not losses.requires_grad and loss.requires_grad == needed
        _, losses = patch_cross_entropy(leaf @ weight.T, target, **options)
        torch.testing.assert_close(losses, expected)
