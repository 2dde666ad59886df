"""A table that patch embedding and the head share: their gradients are one matrix, in the memory of the head's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKEND_DTYPES, DEVICE, compare
from torch.utils._python_dispatch import TorchDispatchMode

from patchkernels import (
    PatchEmbedding,
    PatchLM,
    PatchLMConfig,
    PatchLMHead,
    linear_patch_cross_entropy,
    next_patch_targets,
    patch_embedding,
    reference,
)

pytestmark = pytest.mark.usefixtures("small_blocks")
VOCAB, HIDDEN, SLOTS = 23, 12, 2


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, device=DEVICE)


def table_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, dtype=torch.float64).to(DEVICE, dtype)


def tied(ids, weight, backend="auto", padding_idx=None, **options):
    """The loss of a model without layers."""
    out, table = patch_embedding(ids, weight, SLOTS, padding_idx=padding_idx, return_weight=True, backend=backend)
    return linear_patch_cross_entropy(out, table, next_patch_targets(ids, SLOTS), backend=backend, **options)


def untied(ids, weight, padding_idx=None, **options):
    out = reference.patch_embedding(ids, weight, SLOTS, padding_idx=padding_idx)
    return reference.linear_patch_cross_entropy(out, weight, next_patch_targets(ids, SLOTS), **options)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"memory": "low"}, {"logits_bytes": 200}])
def test_values_and_gradient(backend, dtype, padding_idx, options):
    ids = ids_of(3, 10)
    ids[0, :4] = 3
    reduction = {"reduction": options.get("reduction", "mean")}
    # The loss has the dtype of the table, since the embedding in it is rounded to that.
    compare(
        lambda w: tied(ids, w, backend, padding_idx, **options).to(dtype),
        lambda w: untied(ids, w, padding_idx, **reduction).to(w.dtype),
        table_of(dtype),
    )


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("used", ["embedding", "head", "both", "neither"])
def test_whatever_of_the_two_is_used(backend, used):
    def loss(out, table):
        kept = {"embedding": [out], "head": [table], "both": [out, table], "neither": []}[used]
        return sum((t.square().sum() for t in kept), torch.zeros((), device=DEVICE))

    ids, weight, other = ids_of(2, 6), table_of(), table_of().requires_grad_()
    ours, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    (loss(*patch_embedding(ids, ours, SLOTS, return_weight=True, backend=backend)) + other.sum()).backward()
    (loss(reference.patch_embedding(ids, plain, SLOTS), plain) + other.sum()).backward()
    if used == "neither":
        assert ours.grad is None
    else:
        torch.testing.assert_close(ours.grad, plain.grad)


class Operations(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"reduction": "none"}, {"memory": "low"}])
def test_every_loss_shares_its_gradient(options):
    loss = tied(ids_of(4, 8), table_of().requires_grad_(), **options).sum()
    with Operations() as operations:
        loss.backward()
    assert "patchkernels::patch_embedding_add_gradient_" in operations.names
    assert "patchkernels::patch_embedding_backward" not in operations.names


@pytest.mark.parametrize("autocast", [False, True])
def test_the_tokens_gradients_are_added_to_the_heads(autocast):
    ids, weight = ids_of(4, 8), table_of().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = tied(ids, weight)
    with Operations() as operations:
        loss.backward()
    ours = [name for name in operations.names if name.startswith("patchkernels::")]
    assert ours == ["patchkernels::linear_gradients", "patchkernels::patch_embedding_add_gradient_"]
    assert not [name for name in operations.names if name.startswith("aten::add")]
    plain = weight.detach().clone().requires_grad_()
    untied(ids, plain).backward()
    torch.testing.assert_close(weight.grad, plain.grad, **({"rtol": 0.05, "atol": 0.02} if autocast else {}))


def test_a_second_backward_is_the_first():
    ids, weight = ids_of(4, 8), table_of().requires_grad_()
    loss = tied(ids, weight)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_gradient_that_is_not_the_heads_own_memory_is_left_alone():
    """An expanded one; a transposed one."""
    ids, weight = ids_of(2, 6), table_of().requires_grad_()
    for use in (lambda t: t.sum(), lambda t: (t.T * torch.ones(HIDDEN, VOCAB, device=DEVICE)).sum()):
        out, table = patch_embedding(ids, weight, SLOTS, return_weight=True)
        (gradient,) = torch.autograd.grad(out.sum() + use(table), weight)
        plain = torch.autograd.grad(reference.patch_embedding(ids, weight, SLOTS).sum() + weight.sum(), weight)
        torch.testing.assert_close(gradient, plain[0])


HEADS = {
    "a sum": lambda x, table, delta: linear_patch_cross_entropy(x, table + delta, TARGET),
    "a sum, added before": lambda x, table, delta: linear_patch_cross_entropy(x, delta + table, TARGET),
    "two heads": lambda x, table, delta: (
        linear_patch_cross_entropy(x, table, TARGET) + linear_patch_cross_entropy(x, table, TARGET + 1)
    ),
    "a product": lambda x, table, delta: torch.einsum("bpd,vd->bpv", x, table).square().sum(),
    "a transposed table": lambda x, table, delta: (table.T * torch.arange(VOCAB, device=DEVICE)).sum() + x.sum(),
    "an expanded gradient": lambda x, table, delta: x.sum() + table.sum(),
}
TARGET = torch.arange(6, device=DEVICE).view(2, 3)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_that_others_have_too_are_left_alone(head, compiled, backend):
    ids, weight, delta = ids_of(2, 6), table_of(), table_of()

    def loss(lookup, weight, low_rank):
        grown = low_rank @ torch.eye(HIDDEN, device=DEVICE)  # its gradient is that of the head's weight
        return HEADS[head](*lookup(weight), grown)

    def ours(weight, low_rank):
        return loss(lambda w: patch_embedding(ids, w, SLOTS, return_weight=True, backend=backend), weight, low_rank)

    def plain(weight, low_rank):
        return loss(lambda w: (reference.patch_embedding(ids, w, SLOTS), w), weight, low_rank)

    results = []
    for function in (torch.compile(ours, backend="aot_eager") if compiled else ours, plain):
        leaves = [t.clone().requires_grad_() for t in (weight, delta)]
        results.append(torch.autograd.grad(function(*leaves), leaves, allow_unused=True))
    torch.testing.assert_close(*results)


def test_other_heads_and_hooks_see_what_they_always_saw():
    config = PatchLMConfig(VOCAB, HIDDEN, 16, 1, 2, tie_word_embeddings=True)
    model, ids, seen = PatchLM(config), ids_of(2, 8).cpu(), []
    model(ids, ids, SLOTS).backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(ids, ids, SLOTS).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected)
    head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    head.weight, model.lm_head = model.lm_head.weight, head
    assert model(ids, patch_size=SLOTS).shape == (2, 4, VOCAB)
    assert seen == 2 * [(2, 4, HIDDEN)]


def test_transforms_and_gradients_of_gradients():
    ids, weight = ids_of(2, 6), table_of()
    expected = torch.func.grad(lambda w: untied(ids, w))(weight)
    torch.testing.assert_close(torch.func.grad(lambda w: tied(ids, w))(weight), expected)
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tied(ids, leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), expected)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_modules_share_their_weight():
    embedding, head = PatchEmbedding(VOCAB, HIDDEN, SLOTS), PatchLMHead(HIDDEN, VOCAB)
    head.weight = embedding.weight
    ids = ids_of(2, 6).cpu()
    out, weight = embedding(ids, return_weight=True)
    torch.testing.assert_close(head(out, weight=weight), F.linear(out, embedding.weight))
    target = next_patch_targets(ids, SLOTS)
    head(out, target, weight=weight).backward()
    plain = embedding.weight.detach().clone().requires_grad_()
    untied(ids, plain).backward()
    torch.testing.assert_close(embedding.weight.grad, plain.grad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_tied_model_has_the_gradient_of_both_uses(compiled, labelled):
    config = PatchLMConfig(VOCAB, HIDDEN, 16, 1, 2, tie_word_embeddings=True)
    model, ids = PatchLM(config).to(DEVICE), ids_of(2, 8)
    both = PatchLM(PatchLMConfig(VOCAB, HIDDEN, 16, 1, 2)).to(DEVICE)
    both.load_state_dict(model.state_dict())
    function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for network in (function, both):
        out = network(ids, ids if labelled else None, SLOTS)
        (out if labelled else out.square().sum()).backward()
    expected = both.lm_head.weight.grad + both.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.lm_head.weight.grad, expected)
