"""Patch steps in Hugging Face models: exact against the model itself, and nothing else about it changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import relative_error

from patchkernels import hf, next_patch_targets, reference

transformers = pytest.importorskip("transformers")

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "output_router_logits": True, "router_aux_loss_coef": 0.1}  # fmt: skip
# name: (settings, fused)
MODELS = {
    "Llama": (GROUPED, True),
    "Qwen3": ({**GROUPED, "head_dim": 8}, True),
    "Gemma2": ({**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, True),
    "Gemma3": ({**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, True),
    "Phi": (COMMON, True),  # a bias in the head
    "Cohere": ({**GROUPED, "logit_scale": 0.25}, True),
    "Granite": ({**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0}, True),
    "GPT2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, True),
    "GPTNeoX": (COMMON, True),
    "Mixtral": ({**GROUPED, **MOE}, True),
    "Qwen3Moe": ({**GROUPED, **MOE, "head_dim": 8}, True),
    "OPT": ({**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}, True),
}


def tiny(name: str, dtype: torch.dtype = torch.float64):
    settings, _ = MODELS[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(
        {"Qwen3Moe": "qwen3_moe", "Gemma3": "gemma3_text", "GPTNeoX": "gpt_neox"}.get(name, name.lower()),
        **settings, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} | (
        {"experts_implementation": "eager"} if "output_router_logits" in settings else {}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the small numbers of a fresh model, biases included
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def loss_and_gradients(model, ids, labels):
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_repeated_tokens_in_patches_are_the_tokens(name):
    model = tiny(name)
    ids = torch.randint(3, 64, (2, 8))
    labels = ids.clone()
    labels[0, :3] = -100
    expected = loss_and_gradients(model, ids, labels)
    assert hf.enable(model, 4) is model
    assert (model._patch.map is not None) == MODELS[name][1]
    repeated = (t.repeat_interleave(4, 1) for t in (ids, labels))
    found = loss_and_gradients(model, *repeated)
    assert len(found) == len(expected)
    size = max(gradient.norm() for gradient in expected[1:])
    for a, b in zip(found, expected):  # theirs goes through an fp32 loss; some gradients are 0 but for rounding
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
    targets = next_patch_targets(labels, size)  # K = 1 in patches too: without them it is transformers' own loss
    for given in ({"labels": labels}, {"shift_labels": targets}):
        if size == 1 and "labels" in given:
            continue
        loss = model(input_ids=ids, **given).loss
        for a, b in zip([loss, *torch.autograd.grad(loss, parameters)], exact):
            assert relative_error(a, b) < 1e-12
    ours = model._patch.losses.sum((0, 1)) / model._patch.counted.sum((0, 1))
    torch.testing.assert_close(ours.mean(), expected)


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


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    ids = torch.randint(3, 64, (2, 8))
    repeated = ids.repeat_interleave(4, 1)
    for order in ("enabled first", "wrapped first"):
        for modules, fused in ((["q_proj", "v_proj"], True), (["q_proj", "lm_head", "embed_tokens"], False)):
            model = tiny("Llama")
            config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
            if order == "enabled first":
                hf.enable(model, 4)
                model.patch_size = 1
            model = peft.get_peft_model(model, config).eval()
            expected = loss_and_gradients(model, ids, ids)
            assert hf.enable(model, 4) is model
            assert model.patch_size == 4
            for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                out = again(input_ids=repeated, labels=repeated)
                assert (out.logits is None) == fused
                for a, b in zip(loss_and_gradients(again, repeated, repeated), expected, strict=True):
                    assert relative_error(a, b) < 2e-6
            with hf.token_level(model):
                torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected[0])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny("Llama"), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids, labels=ids).loss, expected[0], rtol=1e-5, atol=0)
    assert not any(hasattr(type(module), "_patch_own") for module in hf.disable(model).modules())


def test_a_model_that_changes_its_logits_otherwise_is_materialised_and_says_so(caplog):
    model = tiny("Llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out - out.mean(-1, keepdim=True) ** 2)
    head = torch.nn.Sequential(model.lm_head)
    model.set_output_embeddings(head)
    expected = loss_and_gradients(model, ids := torch.randint(3, 64, (2, 8)), ids)
    hf.enable(model, 2)
    assert "materialised" in caplog.text
    repeated = ids.repeat_interleave(2, 1)
    for a, b in zip(loss_and_gradients(model, repeated, repeated), expected):
        assert relative_error(a, b) < 2e-6


def test_falcon_h1_scales_token_embeddings_but_not_given_ones_and_is_refused():
    settings = {**GROUPED, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
                "mamba_n_groups": 1, "mamba_d_state": 8, "embedding_multiplier": 3.0}  # fmt: skip
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    with pytest.raises(ValueError, match=r"no patch step of FalconH1ForCausalLM is exact: tokens repeated 2 times"):
        hf.enable(model, 4)
    assert type(model) is transformers.FalconH1ForCausalLM


def test_an_inexact_model_is_refused_and_left_as_it_was():
    class Sliding(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            inputs_embeds = inputs_embeds if input_ids is None else 2 * self.get_input_embeddings()(input_ids)
            return super().forward(inputs_embeds=inputs_embeds, **kwargs)

    model = Sliding(tiny("Llama").config)
    with pytest.raises(ValueError, match=r"no patch step of Sliding is exact: tokens repeated 2 times"):
        hf.enable(model, 4)
    assert type(model) is Sliding
    assert not any(key.startswith("_patch") for module in model.modules() for key in module.__dict__)


def test_token_level_steps_and_what_else_a_model_does_are_untouched(tmp_path):
    model = tiny("Llama", torch.float32)
    own, keys = type(model), list(model.state_dict())
    ids = torch.randint(3, 64, (1, 8))
    expected, generated = model(input_ids=ids, labels=ids), model.generate(ids, max_new_tokens=4, do_sample=False)
    hf.enable(model, 4)
    patch_loss = model(input_ids=ids, labels=ids).loss
    with hf.token_level(model):
        out = model(input_ids=ids, labels=ids)
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    assert model.patch_size == 4
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.mul_(2)  # its own weights, not those of the original
        assert other.patch_size == 4
        assert not torch.equal(other(input_ids=ids, labels=ids).loss, patch_loss)
        assert torch.equal(model(input_ids=ids, labels=ids).loss, patch_loss)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is own
    assert again.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(again(input_ids=ids).logits, expected.logits)
    assert hf.disable(model) is model
    assert type(model) is own
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected.loss)


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


def test_an_old_transformers(monkeypatch):
    model = tiny("Llama")
    monkeypatch.setattr("transformers.__version__", "4.57.3")
    with pytest.raises(ImportError, match=r"needs transformers >= 5.0, found 4.57.3"):
        hf.enable(model, 4)


def test_bad_input():
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
    with pytest.raises(RuntimeError, match="torchrun"):
        model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="got 0"):
        model.patch_size = 0
    with pytest.raises(ValueError, match="'sum'"):
        hf.enable(tiny("Llama"), 4, reduction="sum")
    with pytest.raises(TypeError, match="got Linear"):
        hf.enable(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LlamaModel has no output head"):
        hf.enable(transformers.LlamaModel(model.config))
    sizes = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sizes.items()}
    bart = transformers.BartConfig(vocab_size=64, d_model=16, **sides)
    with pytest.raises(TypeError, match="encoder-decoder"):
        hf.enable(transformers.BartForConditionalGeneration(bart))
