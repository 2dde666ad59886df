"""Registered operators work with opcheck, compile, autocast, checkpointing and FLOP counts, and fail clearly."""

from __future__ import annotations

import importlib
import sys
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, relative_error
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import patchkernels  # noqa: F401  (registers the operators)
from patchkernels import (
    PatchLM,
    PatchLMConfig,
    linear_patch_cross_entropy,
    next_patch_targets,
    patch_cross_entropy,
    patch_embedding,
)
from patchkernels.ops.linear_buffers import chunk_rows
from patchkernels.ops.linear_patch_cross_entropy import MEMORIES, _Call
from patchkernels.ops.linear_vocab_slices import slice_columns

pytestmark = pytest.mark.usefixtures("small_blocks")

ops = torch.ops.patchkernels
K = 4


@pytest.fixture
def tensors():
    ids = torch.randint(0, 30, (2, 16), device=DEVICE)
    embedding = torch.randn(30, 8, device=DEVICE).requires_grad_()
    head = torch.randn(30, 8, device=DEVICE).requires_grad_()
    return ids, embedding, head


def training_loss(ids, embedding, head, patch_size=K, reduction="mean"):
    hidden = patch_embedding(ids, embedding, patch_size)
    target = next_patch_targets(ids, patch_size)
    fused = linear_patch_cross_entropy(hidden, head, target, reduction=reduction)
    low = linear_patch_cross_entropy(hidden, head, target, reduction=reduction, memory="low")
    unfused = patch_cross_entropy(hidden @ head.T, target, reduction=reduction)
    return (fused + 2 * low + 3 * unfused).sum()


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    ids = torch.randint(0, 30, (3, K), device=DEVICE)
    weight, x = torch.randn(30, 8, device=DEVICE, dtype=dtype), torch.randn(3, 8, device=DEVICE, dtype=dtype)
    logits, c = x @ weight.T, torch.rand(3, K, device=DEVICE)
    largest = logits.float().amax(-1)
    statistics = torch.stack([largest, (logits.float() - largest[:, None]).exp().sum(-1)])
    options = (-100, 0.1, 2.0, 0.01)
    settings = (0, 30, "", 10**4, backend, *options)
    one, empty, dlogits = torch.ones((), device=DEVICE), x.new_empty(0), torch.randn_like(logits)
    dtypes = [dtype, torch.float32, dtype]
    cases = [
        (ops.patch_embedding, (ids, weight, None, backend)),
        (ops.patch_embedding, (ids.T[:K, :3].T, weight.T.contiguous().T, 3, backend)),
        (ops.patch_embedding_backward, (x, ids, 30, 3, backend)),
        (ops.patch_embedding_add_gradient_, (torch.randn_like(weight), x, ids, 3, backend)),
        (ops.patch_embedding_add_gradient_, (torch.randn(30, 8, device=DEVICE), x, ids, None, backend)),
        (ops.patch_cross_entropy, (logits, ids, backend, *options)),
        (ops.patch_cross_entropy_backward, (c, logits, ids, statistics, backend, *options)),
        (ops.patch_cross_entropy_backward, (c, logits.T.contiguous().T, ids, statistics, backend, *options)),
        (ops.patch_cross_entropy_reduced, (logits, ids, c, "mean", False, backend, *options)),
        (ops.patch_cross_entropy_reduced, (logits, ids, None, "slot_mean", True, backend, *options)),
        (ops.scaled, (logits, 2 * one, backend)),
        (ops.scale_, (logits.clone(), 2 * one, backend)),
        (ops.linear_losses, (x, weight, None, ids, None, [False] * 3, *settings)),
        (ops.linear_losses, (x, weight, weight[:, 0], ids, c, [True] * 3, *settings)),
        (ops.linear_losses, (x, weight, None, ids, c, [True, False, False], *settings)),
        (ops.linear_loss, (x, weight, None, ids, None, "mean", False, [False] * 3, False, *settings)),
        (ops.linear_loss, (x, weight, weight[:, 0], ids, c[0], "slot_mean", True, [True] * 3, False, *settings)),
        (ops.linear_loss, (x, weight, weight[:, 0], ids, c, "sum", False, [True] * 3, True, *settings)),
        (ops.linear_gradients, (one, empty, dlogits, *[empty] * 3, x, weight, [True] * 3, "", backend, *dtypes)),
        (
            ops.linear_gradients,
            (one, one, dlogits, *[empty] * 3, x, weight, [False, True, False], "", backend, *dtypes),
        ),
        (ops.linear_gradients, (one, one, empty, x, c, empty, None, None, [True, True, False], "", backend, *dtypes)),
        (ops.linear_low_memory, (x, weight, None, ids, 200, backend, *options)),
        (ops.linear_low_memory, (x, weight, weight[:, 0], ids, 10**6, backend, *options)),
        (
            ops.linear_low_memory_backward,
            (c, x, weight, weight[:, 0], ids, statistics, [True] * 3, 200, backend, *options),
        ),
        (
            ops.linear_low_memory_backward,
            (c, x, weight, None, ids, statistics, [False, True, False], 200, backend, *options),
        ),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("reduction", ["mean", "slot_mean", "none"])
def test_compiles_to_one_graph(tensors, reduction):
    ids, *leaves = tensors
    expected = training_loss(ids, *leaves, reduction=reduction)
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, *leaves, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, *leaves, reduction=reduction), expected.detach())


@pytest.mark.parametrize("memory", MEMORIES)
def test_batches_of_other_sizes_compile_once_more_and_then_never_again(memory):
    """The first other size makes the compiled graph take any size; also past 1 MiB of logits, the smallest slice."""
    compiled = CompileCounter()
    loss = torch.compile(linear_patch_cross_entropy, fullgraph=True, backend=compiled)
    head = torch.randn(4096, 4)
    for rows in (64, 96, 12000, 17000, 20000):
        x, target = torch.randn(rows, 4), torch.randint(0, 4096, (rows, 1))
        torch.testing.assert_close(
            loss(x, head, target, memory=memory), linear_patch_cross_entropy(x, head, target, memory=memory)
        )
    assert compiled.frame_count <= 2


def test_compiles_with_inductor(tensors):
    ids, *leaves = tensors
    loss = torch.compile(training_loss, fullgraph=True)(ids, *leaves)
    expected = training_loss(ids, *leaves)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_as_linear_and_gradients_in_the_parameters_dtype(tensors, reduction, memory):
    ids, embedding, head = tensors
    hidden = patch_embedding(ids, embedding, K)
    target = next_patch_targets(ids, K)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = linear_patch_cross_entropy(hidden, head, target, reduction=reduction, memory=memory)
        expected = F.cross_entropy(
            F.linear(hidden, head).float().repeat_interleave(K, 1).flatten(0, 1),
            target.flatten(),
            reduction=reduction,
        )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(ours.sum(), (embedding, head), retain_graph=True)
    expected = torch.autograd.grad(expected.sum(), (embedding, head))
    for a, b in zip(ours, expected):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 0.02


@pytest.mark.parametrize("memory", MEMORIES)
def test_backward_under_autocast_keeps_its_products(tensors, memory):
    ids, embedding, head = tensors
    hidden, target = patch_embedding(ids, embedding, K), next_patch_targets(ids, K)
    loss = linear_patch_cross_entropy(hidden, head, target, reduction="none", memory=memory).sum()
    expected = torch.autograd.grad(loss, (embedding, head), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(loss, (embedding, head)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(tensors, use_reentrant):
    ids, *leaves = tensors
    loss = checkpoint(training_loss, ids, *leaves, use_reentrant=use_reentrant)
    loss.backward()
    expected = torch.autograd.grad(training_loss(ids, *leaves), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


def test_no_grad_and_frozen_parameters_form_no_gradients(tensors, monkeypatch):
    ids, embedding, head = tensors
    hidden, target = patch_embedding(ids, embedding, K).detach(), next_patch_targets(ids, K)
    asked = []
    original = _Call.loss

    def spy(self, *arguments):
        asked.append(arguments[-2:])
        return original(self, *arguments)

    monkeypatch.setattr(_Call, "loss", spy)
    with torch.no_grad():
        linear_patch_cross_entropy(hidden, head, target)
    linear_patch_cross_entropy(hidden, head.detach(), target)
    linear_patch_cross_entropy(hidden, head, target)
    linear_patch_cross_entropy(hidden, head, target, logits_bytes=200)
    assert asked == [([False] * 3, False)] * 2 + [([False, True, False], keep) for keep in (True, False)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(tensors, reduction):
    ids, *leaves = tensors
    loss = training_loss(ids, *leaves, reduction=reduction)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in gradients).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("operator", ["embedding", "logits", "linear", "low memory"])
def test_a_penalty_on_gradients_raises_though_the_upstream_gradient_is_a_constant(tensors, operator, reduction):
    ids, embedding, head = tensors
    x, target = torch.randn(4, 8, device=DEVICE).requires_grad_(), ids[:, :K].reshape(-1, 2)
    options = {"reduction": reduction}
    functions = {
        "embedding": lambda: (embedding, patch_embedding(ids, embedding, K)),
        "logits": lambda: (x, patch_cross_entropy(x, target % 8, **options)),
        "linear": lambda: (x, linear_patch_cross_entropy(x, head, target, **options)),
        "low memory": lambda: (x, linear_patch_cross_entropy(x, head, target, memory="low", **options)),
    }
    leaf, out = functions[operator]()
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), torch.autograd.grad(functions[operator]()[1].sum(), leaf)[0])
    with pytest.raises(RuntimeError, match="gradients of gradients are not defined"):
        (gradient**2).sum().backward(retain_graph=True)
    if operator != "embedding":  # whose gradient does not depend on the table
        # The loss itself is a way to the leaf, so that autograd need not follow the penalty to find one.
        with pytest.raises(RuntimeError, match="gradients of gradients are not defined"):
            torch.autograd.grad((gradient**2).sum() + leaf.sum(), leaf)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("operator", ["logits", "linear"])
def test_every_way_of_calling_the_backward_of_a_reduced_loss(tensors, operator, backend):
    """The upstream gradient is a factor of what the forward has kept, or changes it in place if nobody asks again."""
    _, _, head = tensors
    target, inputs = torch.randint(0, 30, (4, 2), device=DEVICE), torch.randn(4, 30, device=DEVICE)
    if operator == "linear":
        inputs = torch.randn(4, 8, device=DEVICE)
    inputs.requires_grad_()

    def loss():
        if operator == "logits":
            return patch_cross_entropy(inputs, target, backend=backend)
        return linear_patch_cross_entropy(inputs, head, target, backend=backend)

    upstream = torch.tensor([1.0, -3.0, 0.0, 1 / 3, 65536.0], device=DEVICE)
    (unit,) = torch.autograd.grad(loss(), inputs)
    expected = unit * upstream[:, None, None]
    kept = loss()
    again = [torch.autograd.grad(kept, inputs, u, retain_graph=True)[0] for u in upstream]
    torch.testing.assert_close(torch.stack(again), expected)
    once = [torch.autograd.grad(loss(), inputs, u)[0] for u in upstream]
    torch.testing.assert_close(torch.stack(once), expected)
    (batched,) = torch.autograd.grad(loss(), inputs, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, expected)
    created = torch.autograd.grad(2 * loss(), inputs, create_graph=True, retain_graph=False)
    torch.testing.assert_close(created[0].detach(), 2 * unit)
    inputs.grad = None
    for _ in range(3):  # accumulates what may be the forward's own memory
        loss().backward()
    torch.testing.assert_close(inputs.grad, 3 * unit)
    torch.testing.assert_close((loss() + 2 * loss()).detach(), 3 * kept.detach())


@pytest.mark.parametrize("operator", ["embedding", "logits", "linear", "none", "low memory"])
def test_transforms_work_or_say_what_does(tensors, operator):
    """Of torch.func: grad, vjp and jacrev work; second derivatives, vmap and forward mode raise before any work."""
    ids, embedding, head = (t.detach() for t in tensors)
    x, target = torch.randn(4, 8, device=DEVICE), ids[:, :K].reshape(-1, 2)
    loss, leaf, definition = {
        "embedding": (lambda w: (patch_embedding(ids, w, K) ** 2).sum(), embedding, "patch_embedding"),
        "logits": (lambda z: patch_cross_entropy(z, target % 8), x, "patch_cross_entropy"),
        "linear": (lambda x: linear_patch_cross_entropy(x, head, target), x, "linear_patch_cross_entropy"),
        "none": (
            lambda x: linear_patch_cross_entropy(x, head, target, reduction="none").sum(),
            x,
            "linear_patch_cross_entropy",
        ),
        "low memory": (
            lambda x: linear_patch_cross_entropy(x, head, target, memory="low"),
            x,
            "linear_patch_cross_entropy",
        ),
    }[operator]
    (expected,) = torch.autograd.grad(loss(variable := leaf.clone().requires_grad_()), variable)
    for gradient in (
        torch.func.grad(loss)(leaf),
        torch.func.vjp(loss, leaf)[1](torch.ones((), device=DEVICE))[0],
        torch.func.jacrev(loss)(leaf),
    ):
        torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match="gradients of gradients are not defined"):
        torch.func.grad(lambda x: (torch.func.grad(loss)(x) ** 2).sum())(leaf)
    for function, kind in (
        (lambda: torch.func.vmap(loss)(leaf[None]), "vmap"),
        (lambda: torch.func.vmap(torch.func.grad(loss))(leaf[None]), "vmap"),
        (lambda: torch.func.jacfwd(loss)(leaf), "vmap"),
        (lambda: torch.func.jvp(loss, (leaf,), (leaf,)), "forward-mode"),
    ):
        with pytest.raises(
            NotImplementedError, match=f"^{definition} was called under .*{kind}.*reference.{definition}"
        ):
            function()
    if operator != "none":  # compiled as "linear" is
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="aot_eager")(leaf), expected)
        with pytest.raises(NotImplementedError, match=f"^{definition} was called under .*forward-mode"):
            torch.compile(lambda t: torch.func.jvp(loss, (t,), (t,)), backend="aot_eager")(leaf)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Named(torch.Tensor):
    """A tensor that remembers the operators it was given to."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.names.append(func.name())
        with no_dispatch():
            return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_one_node(tensors):
    ids, embedding, head = tensors
    plain = training_loss(ids, embedding, head)
    plain_grads = torch.autograd.grad(plain, [embedding, head])
    nodes = {"patch_embedding", "linear_loss", "linear_low_memory", "patch_cross_entropy_reduced"}
    backwards = {"patch_embedding_backward", "linear_gradients", "linear_low_memory_backward", "scale_"}
    with _Names() as mode:
        loss = training_loss(ids, embedding, head)
        grads = torch.autograd.grad(loss, [embedding, head])
    with torch.profiler.profile() as profile:
        training_loss(ids, embedding, head).backward()
    for names in (mode.names, [event.key for event in profile.key_averages()]):
        assert {f"patchkernels::{name}" for name in nodes | backwards} <= set(names)
    assert torch.equal(loss, plain)
    assert all(torch.equal(*pair) for pair in zip(grads, plain_grads))
    with torch.no_grad():
        out = patch_embedding(ids, embedding.detach().as_subclass(_Named), K)
    assert _Named.names[-1] == "patchkernels::patch_embedding"
    assert torch.equal(out, patch_embedding(ids, embedding, K))


class _Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_function_modes_see_one_node(tensors):
    ids, embedding, _ = tensors
    with _Functions() as mode:
        out = patch_embedding(ids, embedding, K)
    assert any("patchkernels.patch_embedding" in name for name in mode.names)
    assert not any("embedding_bag" in name for name in mode.names)
    assert torch.equal(out, patch_embedding(ids, embedding, K))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_calls_take_other_shapes(tensors):
    ids, embedding, head = (t.detach() for t in tensors)
    traced = torch.jit.trace(lambda ids: patch_embedding(ids, embedding, K), (ids[:1],))
    assert torch.equal(traced(ids), patch_embedding(ids, embedding, K))
    low = torch.jit.trace(lambda x, t: linear_patch_cross_entropy(x, head, t, memory="low"), (head[:2], ids[:, :K]))
    x, target = torch.randn(6, 8, device=DEVICE), torch.randint(0, 30, (6, K), device=DEVICE)
    torch.testing.assert_close(low(x, target), linear_patch_cross_entropy(x, head, target, memory="low"))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_tensors_that_are_negated_or_zero_by_a_flag(backend):
    z, target = torch.randn(3, 30, device=DEVICE), torch.randint(0, 30, (3, K), device=DEVICE)
    for flagged in (torch._neg_view(z), torch._efficientzerotensor((3, 30), device=DEVICE)):
        plain = flagged.resolve_neg() if flagged.is_neg() else torch.zeros_like(z)
        ours = patch_cross_entropy(flagged, target, backend=backend)
        assert torch.equal(ours, patch_cross_entropy(plain, target, backend=backend))


def test_options_that_are_integers_reach_the_kernels_as_floats(monkeypatch):
    from patchkernels.eager import cross_entropy

    seen, loss = [], cross_entropy.loss_and_gradient
    monkeypatch.setattr(
        cross_entropy, "loss_and_gradient", lambda z, t, c, options: seen.append(options) or loss(z, t, c, options)
    )
    z, target = torch.randn(3, 30, requires_grad=True), torch.randint(0, 30, (3, K))
    patch_cross_entropy(z, target, label_smoothing=0, softcap=30, z_loss_weight=1, backend="eager")
    assert seen == [(-100, 0.0, 30.0, 1.0)]
    assert [type(option) for option in seen[0]] == [int, float, float, float]


def test_flops_are_three_products_and_do_not_depend_on_patch_size():
    n, d, v = 12, 8, 30
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    for slots in (1, 4):
        target = torch.randint(0, v, (n, slots))
        for reduction, memory, products in (
            ("mean", "default", 3),
            ("sum", "default", 3),
            ("none", "default", 4),
            ("mean", "low", 4),
            ("none", "low", 4),
        ):
            options = {"reduction": reduction, "memory": memory, "logits_bytes": 300}
            with FlopCounterMode(display=False) as counter:
                linear_patch_cross_entropy(x, w, target, **options).sum().backward()
            assert counter.get_total_flops() == products * 2 * n * v * d
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                linear_patch_cross_entropy(x, w, target, **options)
            assert counter.get_total_flops() == 2 * n * v * d


def test_on_the_meta_device_and_with_int32_ids():
    ids = torch.zeros(2, 16, dtype=torch.int32, device="meta")
    leaves = [torch.randn(30, 8, device="meta", requires_grad=True) for _ in range(2)]
    loss = training_loss(ids, *leaves)
    assert loss.shape == ()
    assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [(30, 8), (30, 8)]
    ids = torch.randint(0, 30, (2, 16))
    leaves = [torch.randn(30, 8) for _ in range(2)]
    assert torch.equal(training_loss(ids.int(), *leaves), training_loss(ids, *leaves))


def test_chunks_stay_within_the_byte_budget():
    for rows in (1, 7, 128, 4099, 100000):
        for row_bytes in (2, 100514, 256512):
            for budget in (1, 2**20, 2**28):
                chunk = chunk_rows(rows, row_bytes, budget)
                assert chunk == 1 or chunk * row_bytes <= budget
                assert chunk <= max(rows, 1)
                fewest = -(-rows // max(1, budget // row_bytes))
                assert -(-rows // chunk) == fewest, "no more chunks than the budget asks for"


def test_slices_stay_within_the_byte_budget_where_16_classes_do():
    for vocab in (1, 30, 50257, 151936):
        for column_bytes in (0, 2, 8198, 65536):
            for budget in (1, 2**20, 2**28):
                columns = slice_columns(vocab, column_bytes, budget)
                assert columns == min(16, vocab) or columns * column_bytes <= budget
                assert columns == vocab or columns % 16 == 0
                assert 1 <= columns <= vocab


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_can_be_exported(strict):
    """The operators are then called with parameters that require grad."""
    model, ids = PatchLM(PatchLMConfig(30, 8, 16, 1, 2, tie_word_embeddings=True)), torch.randint(0, 30, (2, 8))
    exported = torch.export.export(model, (ids, ids, 2), strict=strict).module()
    torch.testing.assert_close(exported(ids, ids, 2), model(ids, ids, 2))


def test_modules_of_operators_can_be_reloaded():
    module = importlib.reload(sys.modules["patchkernels.ops.patch_embedding"])
    ids, table = torch.tensor([[1, 2]]), torch.randn(4, 3)
    torch.testing.assert_close(module.patch_embedding(ids, table, 2), table[1:3].mean(0, keepdim=True)[None])
