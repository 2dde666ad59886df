"""A patch step agrees with the model itself, and a batch that cannot be cut into patches is refused."""

from __future__ import annotations

import pytest
import torch
from hf_models import MODELS, loss_and_gradients, tiny
from oracle import relative_error

from patchkernels import hf, next_patch_targets, reference


@pytest.mark.parametrize("name", MODELS)
def test_repeated_tokens_in_patches_are_the_tokens(name):
    model = tiny(name)
    ids = torch.randint(3, 64, (2, 8))
    labels = ids.clone()
    labels[0, :3] = -100
    expected = loss_and_gradients(model, ids, labels)
    assert hf.enable(model, 4) is model
    assert hf.is_fused(model)
    repeated = (t.repeat_interleave(4, 1) for t in (ids, labels))
    found = loss_and_gradients(model, *repeated)
    assert len(found) == len(expected)
    size = max(gradient.norm() for gradient in expected[1:])
    for a, b in zip(found, expected):  # transformers' loss is in fp32; some gradients are rounding errors of 0
        assert relative_error(a, b) < 2e-6 or (a - b).norm() < 1e-6 * size


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Phi"])
@pytest.mark.parametrize("reduction", ["mean", "slot_mean"])
def test_random_tokens_are_averaged(name, reduction):
    model = tiny(name)
    ids, size = torch.randint(3, 64, (2, 12)), 3
    labels = ids.clone()
    labels[0, 6:8] = -100
    embedded = model.get_input_embeddings()(ids).unflatten(1, (-1, size)).mean(2)
    logits = model(inputs_embeds=embedded).logits
    expected = reference.patch_cross_entropy(logits, next_patch_targets(labels, size), reduction=reduction)
    hf.enable(model, size, reduction=reduction)
    out = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
    assert out.logits is None


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_loss_of_the_paper(size):
    """PatchTrain, section 2, on a Llama: mean embeddings in, and the mean over slots of each slot's cross entropy."""
    model = tiny("Llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    ids = torch.randint(3, 64, (3, 24))
    labels = ids.clone()
    labels[1, 13:] = -100
    means = model.model.embed_tokens(ids).view(3, -1, size, 32).mean(2)
    logits = model.lm_head(model.model(inputs_embeds=means).last_hidden_state)[:, :-1]
    slots = [labels[:, size + k :: size] for k in range(size)]
    expected = sum(torch.nn.functional.cross_entropy(logits.transpose(1, 2), slot) for slot in slots) / size
    parameters = list(model.parameters())
    exact = [expected, *torch.autograd.grad(expected, parameters)]
    hf.enable(model, size, reduction="slot_mean")
    targets = next_patch_targets(labels, size)  # also for K = 1: without these it would be transformers' own loss
    for arguments in ({"labels": labels}, {"shift_labels": targets}):
        if size == 1 and "labels" in arguments:
            continue
        loss = model(input_ids=ids, **arguments).loss
        for a, b in zip([loss, *torch.autograd.grad(loss, parameters)], exact):
            assert relative_error(a, b) < 1e-12
    step = model._patch_state.last_step
    slot_losses = step.losses.sum((0, 1)) / (step.target != -100).sum((0, 1))
    torch.testing.assert_close(slot_losses.mean(), expected)


def test_a_batch_brings_its_patches_whatever_the_patch_size_is():
    model = hf.enable(tiny("Llama"), 4)
    ids = torch.randint(3, 64, (2, 16))
    for size in (2, 4, 8):
        model.patch_size = size
        expected = model(input_ids=ids, labels=ids).loss
        model.patch_size = 1
        found = model(input_ids=ids, labels=ids, shift_labels=next_patch_targets(ids, size)).loss
        assert torch.equal(found, expected)


def test_embeddings_are_averaged_by_the_operator_with_no_gradient_at_padding():
    model = tiny("Llama")
    table = model.model.embed_tokens
    table.padding_idx = 5
    ids = torch.randint(3, 64, (2, 8))
    ids[0, 2] = 5
    targets = next_patch_targets(ids, 4)
    means = table(ids).unflatten(1, (2, 4)).mean(2)
    expected = reference.patch_cross_entropy(model(inputs_embeds=means).logits, targets)
    (gradient,) = torch.autograd.grad(expected, [table.weight])
    hf.enable(model, 4)
    with torch.profiler.profile() as profile:
        loss = model(input_ids=ids, labels=ids).loss
    assert "patchkernels::patch_embedding" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [table.weight])[0], gradient)
    assert not gradient[5].any()


def test_checkpointing_autocast_compile_and_counted_items():
    model = hf.enable(tiny("Llama", torch.float32), 4).train()
    ids = torch.randint(3, 64, (2, 16))
    expected = loss_and_gradients(model, ids, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(loss_and_gradients(model, ids, ids), expected)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected[0], rtol=2e-2, atol=0)
    counted = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(48)).loss
    torch.testing.assert_close(counted, expected[0] * (2 * 3 * 4) / 48)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids).loss, expected[0])


def test_right_padding_and_packed_documents():
    model = tiny("Llama")
    ids, size = torch.randint(3, 64, (1, 16)), 2
    hf.enable(model, size)
    expected = model(input_ids=ids[:, :8], labels=ids[:, :8]).loss
    labels = ids.clone()
    labels[:, 8:] = -100
    mask = (torch.arange(16) < 8).long()[None]
    torch.testing.assert_close(model(input_ids=ids, labels=labels, attention_mask=mask).loss, expected)
    # two documents of 8 tokens in a row: each loss has three patches of two targets
    apart = [model(input_ids=part, labels=part).loss for part in ids.chunk(2, 1)]
    positions = torch.cat([torch.arange(8), torch.arange(8)])[None]
    together = model(input_ids=ids, labels=ids, position_ids=positions).loss
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_batches_that_cannot_be_cut_into_patches():
    model = hf.enable(tiny("Llama"), 4)
    ids = torch.randint(3, 64, (2, 8))
    for arguments, message in (
        ({"input_ids": ids}, "needs labels"),
        ({"labels": ids, "inputs_embeds": torch.zeros(2, 8, 32)}, "needs input_ids"),
        ({"input_ids": ids[:, :6], "labels": ids[:, :6]}, r"divisible by patch_size=4, got \(2, 6\)"),
        ({"input_ids": ids, "labels": ids[:, :4]}, r"\(2, 8\) and \(2, 4\)"),
        ({"input_ids": ids, "labels": ids, "attention_mask": (torch.arange(8) > 3).expand(2, 8)}, "right padding"),
        ({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(2, 4)}, "shape of input_ids"),
        ({"input_ids": ids, "shift_labels": torch.zeros(2, 3, 4)}, r"\(2, 3, 4\) and \(2, 8\)"),
        (
            {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]])},
            "patch boundaries",
        ),
    ):
        with pytest.raises(hf.PatchSizeError, match=message):
            model(**arguments)
