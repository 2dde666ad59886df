"""Models are enabled if a patch step is exact and refused if not, and nothing else about them changes."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from hf_models import GROUPED, loss_and_gradients, tiny, transformers
from oracle import relative_error

from patchkernels import hf
from patchkernels.hf import probe
from patchkernels.hf.class_swap import SwappedClass


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
    assert not any(isinstance(module, SwappedClass) for module in hf.disable(model).modules())


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


class Clamped(transformers.LlamaForCausalLM):
    """Clamps its logits, unless they are as large as those with which ``enable`` finds out what becomes of them."""

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, **_):
        logits = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds).logits
        logits = logits if logits.abs().max() > 100 else logits.clamp(-1, 1)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss, logits)


def test_a_copy_runs_and_not_the_model(monkeypatch):
    runs = []

    def counted(forward):
        @functools.wraps(forward)
        def run(self, *args, **kwargs):
            runs.append(self)
            return forward(self, *args, **kwargs)

        return run

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counted(transformers.LlamaForCausalLM.forward))
    model = hf.enable(tiny("Llama"), 4)
    assert hf.is_fused(model) and len(runs) == 15 and model not in runs
    hf.enable(model, 2)
    assert len(runs) == 15
    other = tiny("Llama")
    other.set_output_embeddings(torch.nn.Sequential(other.lm_head))
    hf.enable(other, 4)
    assert not hf.is_fused(other) and len(runs) == 15 + 14 and other not in runs


def test_a_loss_that_is_inexact_in_the_head_is_materialised(monkeypatch):
    model = Clamped(tiny("Llama").config).double()
    model.load_state_dict(tiny("Llama").state_dict())
    ids = torch.randint(3, 64, (2, 8))
    expected = loss_and_gradients(model, ids, ids)
    tried = []
    check_step = probe.check_step
    monkeypatch.setattr(probe, "check_step", lambda trial, kind: tried.append(kind) or check_step(trial, kind))
    hf.enable(model, 2)
    assert not hf.is_fused(model) and [kind.logit_map is None for kind in tried] == [False, True]
    assert type(model.lm_head) is torch.nn.Linear
    repeated = ids.repeat_interleave(2, 1)
    for a, b in zip(loss_and_gradients(model, repeated, repeated), expected):
        assert relative_error(a, b) < 2e-6


def test_a_step_that_fails_leaves_no_trace():
    model = tiny("Llama")
    ids = torch.randint(3, 64, (2, 8))
    expected = model(input_ids=ids, labels=ids)
    hf.enable(model, 4)
    patch_loss = model(input_ids=ids, labels=ids).loss

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=ids, labels=ids)
    hook.remove()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, patch_loss)
    with hf.token_level(model):
        out = model(input_ids=ids, labels=ids)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)


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


def test_an_old_transformers(monkeypatch):
    model = tiny("Llama")
    monkeypatch.setattr("transformers.__version__", "4.57.3")
    with pytest.raises(ImportError, match=r"needs transformers >= 5.0, found 4.57.3"):
        hf.enable(model, 4)


def test_bad_input():
    model = hf.enable(tiny("Llama"), 4)
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
    musicgen = transformers.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, num_codebooks=4
    )
    with pytest.raises(TypeError, match="MusicgenForCausalLM has 4 output heads"):
        hf.enable(transformers.MusicgenForCausalLM(musicgen))
    sizes = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sizes.items()}
    bart = transformers.BartConfig(vocab_size=64, d_model=16, **sides)
    with pytest.raises(TypeError, match="encoder-decoder"):
        hf.enable(transformers.BartForConditionalGeneration(bart))
    with pytest.raises(TypeError, match="must be an integer, got True"):
        model.patch_size = True
    with pytest.raises(TypeError, match="enable a model before it is compiled or wrapped"):
        hf.enable(torch.compile(model))
    other = tiny("Llama")
    other.lm_head = model.lm_head
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is part of another enabled model"):
        hf.enable(other)
    assert type(other) is transformers.LlamaForCausalLM and hf.is_fused(model)


def test_prompts_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(tiny("Llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        with pytest.raises(ValueError, match="LlamaForCausalLM has a prompt of PEFT"):
            hf.enable(model, 4)


def test_the_class_of_an_enabled_model_makes_ordinary_models(tmp_path):
    model = hf.enable(tiny("Llama"), 4)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 64, (2, 16))
    for other in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert type(other) is transformers.LlamaForCausalLM and other(input_ids=ids, labels=ids).logits is not None
        assert hf.enable(other, 4).patch_size == 4


def test_what_is_built_on_an_enabled_model_is_removed_before_it():
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = hf.enable(tiny("Llama", torch.float32), 4), torch.randint(3, 64, (2, 16))
    expected = model(input_ids=ids, labels=ids).loss
    hooks.add_hook_to_module(model, hooks.ModelHook())
    with pytest.raises(ValueError, match="the forward of a LlamaForCausalLM was replaced after"):
        hf.disable(model)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    hooks.remove_hook_from_module(model)
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match="ParametrizedLinear was given another class after"):
        hf.disable(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    torch.nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    hf.disable(model)
    assert type(model) is transformers.LlamaForCausalLM


def test_an_adapter_around_the_head_after_enabling_needs_logits():
    peft = pytest.importorskip("peft")
    model = hf.enable(tiny("Llama"), 4)
    assert hf.is_fused(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    assert not hf.is_fused(adapted)
