"""A patch step agrees with the model itself, and a batch that cannot be cut into patches is refused."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import numpy
import pytest
import torch
import torch.nn.functional as F
from hf_models import MODELS, loss_and_gradients, tiny, transformers
from oracle import relative_error
from torch.distributed.fsdp import fully_shard

from patchkernels import hf, next_patch_targets, reference
from patchkernels.hf.modules import has_foreign_hooks
from patchkernels.hf.small_config import small_config


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
    model._patch_state.last_step = None
    loss = compiled(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(model._patch_state.last_step.losses.sum() / (2 * 3 * 4), expected[0])
    whole = torch.utils.checkpoint.checkpoint(lambda: model(input_ids=ids, labels=ids).loss, use_reentrant=False)
    model.zero_grad()
    whole.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected[1:])


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
    # all tokens of a patch of padding may have the same position
    labels = ids.masked_fill(torch.arange(16) >= 8, -100)
    for position in (0, 1, 7):
        padded = torch.cat([torch.arange(8), torch.full((8,), position)])[None]
        torch.testing.assert_close(model(input_ids=ids, labels=labels, position_ids=padded).loss, apart[0])
        few = torch.cat([torch.arange(1), torch.full((15,), position)])[None]  # a row of a single token
        labels_of_few = ids.masked_fill(torch.arange(16) > 0, -100)
        assert model(input_ids=ids, labels=labels_of_few, position_ids=few).loss == 0


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


def losses_of_threads(call, batches):
    """What ``call`` returns for each batch, all batches at once, each in a thread of its own."""
    results, begin = [None] * len(batches), threading.Barrier(len(batches))

    def work(number):
        begin.wait()
        results[number] = [call(batches[number]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_that_share_a_model(compiled):
    model = hf.enable(tiny("Llama", torch.float32), 4)
    parameters = list(model.parameters())
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

    def call(ids):
        loss = run(input_ids=ids, labels=ids).loss
        step = model._patch_state.last_step
        gradients = torch.autograd.grad(loss, parameters)
        return [loss.detach(), step.losses, step.target, *gradients]

    batches = [torch.randint(3, 64, (2, 16)) for _ in range(8)]
    expected = [call(ids) for ids in batches]
    for found, wanted in zip(losses_of_threads(call, batches), expected):
        assert found is not None, "the thread failed"
        for again in found:
            torch.testing.assert_close(again, wanted)
    assert torch.equal(model._patch_state.last_step.target, expected[-1][2])  # that of this thread
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._patch_state.last_step is None
        torch.testing.assert_close(other(input_ids=batches[0], labels=batches[0]).loss, expected[0][0])


def test_a_model_that_is_called_inside_its_own_step():
    model = tiny("Llama")
    ids, other = torch.randint(3, 64, (2, 2, 16))
    token_loss = model(input_ids=other, labels=other).loss
    hf.enable(model, 4)
    expected, other_expected = (model(input_ids=batch, labels=batch).loss for batch in (ids, other))
    inside = []

    def call_again(*_):
        if len(inside) % 2 == 0:
            inside.append(None)
            with hf.token_level(model):
                inside[-1] = model(input_ids=other, labels=other).loss, model(input_ids=other).logits.shape
            inside.append(model(input_ids=other, labels=other).loss)

    model.model.layers[0].register_forward_hook(call_again)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    assert torch.equal(inside[0][0], token_loss) and inside[0][1] == (2, 16, 64)
    assert torch.equal(inside[1], other_expected)


def test_token_level_is_that_of_a_thread():
    model = hf.enable(tiny("Llama"), 4)
    ids = torch.randint(3, 64, (2, 16))
    loss, entered, finished = model(input_ids=ids, labels=ids).loss, threading.Event(), threading.Event()

    def token_level():
        with hf.token_level(model):
            entered.set()
            finished.wait(60)

    with hf.token_level(model):
        (thread := threading.Thread(target=token_level)).start()
        assert entered.wait(60) and model.patch_size == 1
    assert model.patch_size == 4 and torch.equal(model(input_ids=ids, labels=ids).loss, loss)
    finished.set()
    thread.join()
    assert model.patch_size == 4


class Changing(type(tiny("Llama"))):
    """A model that does more than a patch step knows of, once it is told to."""

    does = ""

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        logits = self.lm_head(hidden.last_hidden_state)
        if self.does == "mask labels":
            labels = labels.masked_fill(attention_mask == 0, -100)
        if self.does == "cut labels":
            labels = labels[:, :-1]
        if self.does == "scale":
            logits = logits / 2
        if self.does == "bias":
            logits = logits + torch.ones(64)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=64, **kwargs)
        if self.does == "two losses":
            loss = loss + self.loss_function(logits, labels, vocab_size=64)
        if self.does == "z-loss":
            loss = loss + 1e-5 * logits.logsumexp(-1).square().mean()
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss, logits)


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [
        ("mask labels", hf.PatchSizeError, "changes the labels"),
        ("cut labels", hf.PatchSizeError, "changes the labels"),
        ("scale", hf.PatchSizeError, "changes its logits otherwise than when it was enabled"),
        ("bias", hf.PatchSizeError, "changes its logits otherwise than when it was enabled"),
        ("two losses", hf.PatchSizeError, "calls its loss function twice"),
        ("z-loss", RuntimeError, "uses the logits of a patch step for more than its loss function"),
    ],
)
def test_a_model_that_does_something_else_later(does, error, message):
    model = hf.enable(Changing(tiny("Llama").config), 4)
    ids, mask = torch.randint(3, 64, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[0, 8:] = 0
    model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
    assert hf.is_fused(model)
    model.does = does
    with pytest.raises(error, match=message):
        model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()


def test_what_is_wrong_in_a_compiled_step_is_not_a_number():
    """A compiled graph cannot raise, and neither can a GPU without a wait."""
    model = hf.enable(Changing(tiny("Llama").config), 4)
    ids, mask = torch.randint(3, 64, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[0, 8:] = 0
    for does, is_wrong in (("", False), ("mask labels", True), ("scale", True)):
        model.does = does
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert run(input_ids=ids, labels=ids, attention_mask=mask).loss.isnan() == is_wrong
    model.does = "z-loss"
    torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.isnan().any()


def weighted(logits, labels, vocab_size=None, num_items_in_batch=None, **options):
    weight = options.get("class_weight")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), weight)


def test_options_of_a_loss_function_of_the_users():
    model = tiny("Llama")
    model.loss_function = weighted
    hf.enable(model, 4)
    ids = torch.randint(3, 64, (2, 16))
    of_forward = {"output_hidden_states": True, "return_dict": True, "cu_seq_lens_q": torch.tensor([0, 4, 8])}
    model(input_ids=ids, labels=ids, **of_forward, some_flag=False)
    with pytest.raises(hf.PatchSizeError, match="the loss of a patch step takes no class_weight"):
        model(input_ids=ids, labels=ids, class_weight=torch.ones(64))
    with pytest.raises(ValueError, match="the loss of an enabled model cannot be changed"):
        model.loss_function = weighted
    plain = hf.enable(tiny("Llama"), 4)  # the loss of transformers ignores what it does not know
    plain(input_ids=ids, labels=ids, class_weight=torch.ones(64), ignore_index=-100)


def test_two_enabled_models_that_share_their_head_and_embedding():
    model, other = (hf.enable(tiny("Llama"), 4) for _ in range(2))
    ids = torch.randint(3, 64, (2, 16))
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    expected = loss_and_gradients(other, ids, ids)
    model.lm_head, model.model.embed_tokens = other.lm_head, other.model.embed_tokens
    for shared in (model, other):
        torch.testing.assert_close(loss_and_gradients(shared, ids, ids), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_a_tuple_is_returned_if_asked_for(fused):
    model = tiny("Llama")
    ids = torch.randint(3, 64, (2, 16))
    hf.enable(model, 4)
    if not fused:
        model.lm_head.register_forward_hook(lambda module, args, output: output)
    expected = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert ("logits" in expected) == (not fused) and (expected["loss"] == expected.loss)
    loss, logits, hidden = model(input_ids=ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert (logits is None) if fused else torch.equal(logits, expected.logits)
    assert len(hidden) == 3 and torch.equal(hidden[-1], expected.hidden_states[-1])
    assert len(model(ids, None, None, None, None, ids, return_dict=False)) == 2  # the sixth by position is labels


def test_a_configuration_that_asks_for_tuples():
    settings = small_config(
        transformers.BloomConfig(return_dict=False)
    )  # not all models support it in their own forward
    model = hf.enable(transformers.BloomForCausalLM(settings).eval(), 4)
    ids = torch.randint(3, 64, (2, 16))
    loss, logits = model(input_ids=ids, labels=ids)
    assert logits is None and torch.equal(model(input_ids=ids, labels=ids, return_dict=True).loss, loss)


def test_labels_that_are_shifted_by_a_token():
    """As transformers shifts them: ``shift_labels[:, t]`` is the target of token t, which is token t + 1."""
    model = tiny("Llama")
    ids = torch.randint(3, 64, (2, 16))
    labels = ids.clone()
    labels[0, 6:9] = -100
    shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    hf.enable(model, 4)
    expected = model(input_ids=ids, labels=labels).loss
    assert torch.equal(model(input_ids=ids, shift_labels=shift_labels).loss, expected)
    assert torch.equal(model(input_ids=ids, labels=ids, shift_labels=shift_labels).loss, expected)
    shift_labels[:, -1] = 7  # the first token of the part of the text that follows the row
    model(input_ids=ids, shift_labels=shift_labels)
    assert model._patch_state.last_step.target[:, -1].tolist() == [[7, -100, -100, -100]] * 2


@pytest.mark.parametrize("where", ["before", "after"])
def test_hooks_on_the_head_see_logits_and_hooks_on_the_embedding_see_tokens(where):
    def halve(module, args, output):
        assert output.shape[1:] == (4, 64)  # logits of 4 patches
        return output / 2

    def shift(module, args, output):
        assert output.shape[1:] == (16, 32)
        return output + 1

    model = tiny("Llama")
    ids = torch.randint(3, 64, (2, 16))
    if where == "after":
        hf.enable(model, 4)
    hooks = [model.lm_head.register_forward_hook(halve), model.model.embed_tokens.register_forward_hook(shift)]
    plain = tiny("Llama")
    means = plain.model.embed_tokens(ids).unflatten(1, (4, 4)).mean(2) + 1
    logits = plain(inputs_embeds=means).logits / 2
    expected = reference.patch_cross_entropy(logits, next_patch_targets(ids, 4))
    if where == "before":
        hf.enable(model, 4)
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, logits)
    for hook in hooks:
        hook.remove()
    hf.enable(plain, 4)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)


def test_a_backward_hook_on_the_head_sees_gradients_of_logits():
    model = hf.enable(tiny("Llama"), 4)
    ids, seen = torch.randint(3, 64, (2, 16)), []
    hook = model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen == [(2, 4, 64)]
    hook.remove()
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(seen) == 1


def test_the_hooks_of_fsdp2_do_not_count():
    model = tiny("Llama")
    ids = torch.randint(3, 64, (2, 16))
    hf.enable(model, 4)
    expected = model(input_ids=ids, labels=ids).loss
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for unit in (model.model.embed_tokens, model.lm_head, model):
            fully_shard(unit, mesh=mesh)
            assert unit._forward_hooks and not has_foreign_hooks(unit)
        output = model(input_ids=ids, labels=ids)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected)
        with hf.token_level(model):
            assert model(input_ids=ids, labels=ids).logits.shape == (2, 16, 64)
    finally:
        torch.distributed.destroy_process_group()


def test_generation_in_a_patch_phase_is_token_level_and_says_so(caplog):
    model = tiny("Llama", torch.float32)
    ids = torch.randint(3, 64, (1, 8))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    hf.enable(model, 4)
    with caplog.at_level(logging.WARNING, "patchkernels"):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert caplog.text.count("generates text token by token although its patch_size is 4") == 1
    with pytest.raises(hf.PatchSizeError, match="token_level"):
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"past_key_values": transformers.DynamicCache()},
        {"use_cache": True},
        {"cache_position": torch.arange(16)},
        {"logits_to_keep": 4},
        {"logits_to_keep": torch.arange(4)},
        {"inputs_embeds": torch.zeros(2, 16, 32)},
        {"shift_labels": torch.zeros(2, 15, dtype=torch.long)},
        {"attention_mask": {"full_attention": torch.ones(2, 16)}},
        {"attention_mask": torch.ones(2, 1, 16, 16)},
        {"position_ids": torch.arange(16)},
        {"position_ids": torch.arange(8)[None]},
        {"cu_seq_lens_q": torch.tensor([0, 16, 32])},
        {"token_type_ids": (torch.arange(16) > 5).long().expand(2, 16)},
        {"seq_idx": torch.zeros(1, 16)},
        {"weights": torch.ones(2, 16)},
        {"features": [torch.ones(2, 16, 3)]},
        {"bias": torch.ones(4, 16, 16)},
        {"kinds": torch.ones(3, 2, 16)},
        {"flat": torch.ones(32)},
        {"by_name": {"a": torch.ones(2, 5, 16)}},
        {"array": numpy.ones((2, 16))},
        {"position_ids": torch.zeros(1, 16, dtype=torch.long)},
        {"position_ids": torch.arange(16).flip(0)[None]},
        {"position_ids": torch.arange(2, 18)[None]},
        {"ignore_index": 7},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_of_tokens_are_refused(arguments):
    model = hf.enable(tiny("Llama"), 4)
    ids = torch.randint(3, 64, (2, 16))
    with pytest.raises(hf.PatchSizeError):
        model(input_ids=ids, labels=ids, **arguments)


def test_arguments_that_reach_the_model_as_those_of_patches():
    received: dict[str, object] = {}
    types = (torch.arange(16) > 7).long().expand(2, 16)
    extra = {
        "token_type_ids": types, "cu_seq_lens_q": torch.tensor([0, 4, 8]), "seq_idx": torch.zeros(2, 4),
        "sequence_weights": torch.ones(2), "flag": True,
    }  # fmt: skip

    class Recording(type(tiny("Llama"))):
        def forward(self, **kwargs):
            received.update(kwargs)
            return super().forward(**{name: value for name, value in kwargs.items() if name not in extra})

    model = Recording(tiny("Llama").config).eval()
    hf.enable(model, 4)
    ids = torch.randint(3, 64, (2, 16))
    model(input_ids=ids, labels=ids, **extra)
    assert received["token_type_ids"].tolist() == [[0, 0, 1, 1]] * 2
    assert all(received[name] is extra[name] for name in ("cu_seq_lens_q", "seq_idx", "sequence_weights", "flag"))
    weights = extra["token_weights"] = torch.ones(2, 16)
    model(input_ids=ids, shift_labels=next_patch_targets(ids, 1), token_weights=weights)  # a patch is a token
    assert received["token_weights"] is weights
    with pytest.raises(TypeError, match="several values for input_ids"):
        hf.enable(tiny("Llama"), 4)(ids, input_ids=ids, labels=ids)
    assert model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=0).loss == 0
    assert model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0)).loss == 0
