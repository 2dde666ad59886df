"""What is not exact is refused, whatever weights and dtype are, what is exact is enabled, and nothing else changes."""

from __future__ import annotations

import inspect
import random
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from distributed import run
from hf_models import GROUPED, MODELS, loss_and_gradients, tiny, transformers
from oracle import relative_error
from torch import nn

from patchkernels import hf, next_patch_targets, reference
from patchkernels.hf import modules, probe, probe_copy
from patchkernels.hf.modules import LogitMap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_attention_heads": 2}
DECODER = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
           "is_decoder": True, **LAYERS, **HEADS}  # fmt: skip
BERT = {**GROUPED, "pad_token_id": 0}
precisions_seen = set()  # of products of fp32 matrices and of convolutions, while a model runs
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
LLAMA = transformers.LlamaConfig(**GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2)
Output = transformers.modeling_outputs.CausalLMOutputWithPast


class Own(transformers.LlamaForCausalLM):
    """A user's model on the trunk of a Llama."""

    def logits(self, input_ids, inputs_embeds):
        return self.lm_head(self.model(input_ids=input_ids, inputs_embeds=inputs_embeds).last_hidden_state)

    def loss(self, logits, labels):
        return self.loss_function(logits, labels, vocab_size=self.config.vocab_size)

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, **_):
        logits = self.logits(input_ids, inputs_embeds)
        return Output(None if labels is None else self.loss(logits, labels), logits)


class InlineLoss(Own):
    def loss(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class InlineSmoothing(Own):
    def loss(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), label_smoothing=0.1)


def smoothed(logits, labels, vocab_size=None, **_):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), label_smoothing=0.1)


class SmoothingLossFunction(Own):
    loss_function = staticmethod(smoothed)


class SecondEmbedding(Own):
    """Adds a second embedding of the ids, zero at first, which embeddings from outside do not have."""

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.zeros_(self.second.weight)

    def logits(self, input_ids, inputs_embeds):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids) + self.second(input_ids)
        return super().logits(None, inputs_embeds)


class InTraining:
    """Does what the class after it does, but only in training mode; otherwise what a plain model does."""

    def logits(self, *args):
        return super().logits(*args) if self.training else Own.logits(self, *args)

    def loss(self, *args):
        return super().loss(*args) if self.training else Own.loss(self, *args)


class SecondEmbeddingInTraining(InTraining, SecondEmbedding):
    pass


class PredictsTwiceInTraining(Own):
    """Predicts the token after the next one too, while it is trained."""

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        return loss + super().loss(logits[:, :-1].contiguous(), labels[:, 1:].contiguous()) if self.training else loss


class SlightlySmoothed(Own):
    def loss_function(self, logits, labels, vocab_size):
        z_loss = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + 1e-5 * z_loss


class MaskedLlama(Own):
    """Attends where ``visible`` says; the trunk has no mask of its own then."""

    def logits(self, input_ids, inputs_embeds):
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self.visible(input_ids, x)
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return self.lm_head(self.model(inputs_embeds=x, attention_mask=mask).last_hidden_state)


def causal(x):
    return torch.ones(len(x), 1, x.shape[1], x.shape[1], dtype=torch.bool).tril()


class SeparatesDocuments(MaskedLlama):
    """No position sees the document before, and documents end where the ids say so."""

    def visible(self, ids, x):
        if ids is None:
            return causal(x)
        number = (ids == self.config.eos_token_id).cumsum(1)
        return causal(x) & (number[:, None, :, None] == number[:, None, None, :])


class SeesPrefix(MaskedLlama):
    """The first four positions see each other."""

    def visible(self, ids, x):
        mask = causal(x)
        mask[..., :4, :4] = True
        return mask


class SeesBlocks(MaskedLlama):
    """The positions of a block of seven see each other."""

    def visible(self, ids, x):
        block = torch.arange(x.shape[1]) // 7
        return causal(x) | (block[:, None] == block)


class HalfLoss(Own):
    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.loss = None if out.loss is None else out.loss / 2
        return out


class TwoLosses(Own):
    def loss(self, logits, labels):
        return super().loss(logits, labels) + 0 * super().loss(logits, labels)


class OtherLabels(Own):
    def loss(self, logits, labels):
        return super().loss(logits, labels.where(labels != 5, 6).roll(1, 0))


class OtherLogits(Own):
    def loss(self, logits, labels):
        return super().loss(logits * 2, labels)


class LooksAhead(Own):
    """The logits of a row depend on the next one, if they come from this kind of input."""

    of_ids = True

    def logits(self, input_ids, inputs_embeds):
        logits = super().logits(input_ids, inputs_embeds)
        return logits + 0.01 * logits.roll(-1, 1) if (input_ids is not None) == self.of_ids else logits


class LooksAheadInEmbeddings(LooksAhead):
    of_ids = False


class OtherGradient(Own):
    """Half the gradient reaches embeddings that come from outside; every number forward is the same."""

    def logits(self, input_ids, inputs_embeds):
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.detach() + (inputs_embeds - inputs_embeds.detach()) / 2
        return super().logits(input_ids, inputs_embeds)


class MissingGradient(SecondEmbedding):
    """The second embedding has a gradient of zeros, but none where the embeddings come from outside."""

    def logits(self, input_ids, inputs_embeds):
        logits = Own.logits(self, input_ids, inputs_embeds)
        return logits if input_ids is None else logits + 0 * self.second(input_ids).sum()


class WideLogits(Own):
    """Divides its logits by a width (muP): 32 / 64 at the size of these tests, another number in a tiny model."""

    def logits(self, input_ids, inputs_embeds):
        return super().logits(input_ids, inputs_embeds) * (32 / self.config.hidden_size)


class Divider(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, logits):
        return logits * (32 / self.width)


class DividesInAModule(Own):
    def __init__(self, config):
        super().__init__(config)
        self.divider = Divider(config.hidden_size)

    def logits(self, input_ids, inputs_embeds):
        return self.divider(super().logits(input_ids, inputs_embeds))


def gemma3n():
    config = transformers.Gemma3nTextConfig(
        **GROUPED | {"intermediate_size": [48] * 2}, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=8,
        vocab_size_per_layer_input=64, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0], pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(config)


def decoder(name, **settings):
    config = getattr(transformers, f"{name}Config")(**DECODER | settings)
    return lambda: getattr(transformers, f"{name}ForCausalLM")(config)


PROPHETNET = transformers.ProphetNetConfig(
    vocab_size=64, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_encoder_layers=2, num_decoder_layers=2,
    num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=64, is_decoder=True,
)  # fmt: skip
INLINE = r"let it call self\.loss_function\(logits, labels, vocab_size=self\.config\.vocab_size\)"
REPEATED = r"tokens repeated 2 times in patches give "
REFUSED = {
    "an inline loss": (lambda: InlineLoss(LLAMA), INLINE),
    "an inline loss with smoothing": (lambda: InlineSmoothing(LLAMA), INLINE),
    "a loss function with smoothing": (lambda: SmoothingLossFunction(LLAMA), "the mean cross entropy of its logits"),
    "a second embedding": (lambda: SecondEmbedding(LLAMA), REPEATED),
    "a second embedding in training": (
        lambda: SecondEmbeddingInTraining(LLAMA), "tokens repeated 3 times in patches give"),
    "a second prediction in training": (lambda: PredictsTwiceInTraining(LLAMA), "calls its loss function 2 times"),
    "a small z-loss": (lambda: SlightlySmoothed(LLAMA), "the mean cross entropy of its logits"),
    "documents in the ids": (lambda: SeparatesDocuments(LLAMA), REPEATED),
    "a prefix": (lambda: SeesPrefix(LLAMA), "not causal"),
    "blocks": (lambda: SeesBlocks(LLAMA), "not causal"),
    "half the loss": (lambda: HalfLoss(LLAMA), "what is added to the loss"),
    "two losses": (lambda: TwoLosses(LLAMA), "calls its loss function 2 times"),
    "other labels": (lambda: OtherLabels(LLAMA), "other labels"),
    "other logits": (lambda: OtherLogits(LLAMA), "the logits that its loss function receives"),
    "later tokens": (lambda: LooksAhead(LLAMA), "not causal: .* input_ids"),
    "later embeddings": (lambda: LooksAheadInEmbeddings(LLAMA), "not causal: .* inputs_embeds"),
    "another gradient": (lambda: OtherGradient(LLAMA), "gradient of model.embed_tokens.weight that is off by 5"),
    "a missing gradient": (lambda: MissingGradient(LLAMA), "patches give no gradient of second.weight"),
    "BertForMaskedLM": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), INLINE),
    "a BERT that looks ahead": (
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=False)), "not causal"),
    "Gemma3n": (gemma3n, REPEATED),
    "Marian": (decoder("Marian"), INLINE),
    "BigBirdPegasus": (decoder("BigBirdPegasus"), INLINE),
    "Pegasus": (decoder("Pegasus"), INLINE),
    "ProphetNet": (lambda: transformers.ProphetNetForCausalLM(PROPHETNET), INLINE),
}  # fmt: skip


def without_head(model):
    """The model with a head of zeros: its loss is log V whatever else it computes."""
    nn.init.zeros_(model.get_output_embeddings().weight)
    return model


def fresh(name):
    """A model as transformers initialises it."""
    torch.manual_seed(0)
    if name == "Mamba":
        config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, expand=2)
        return transformers.MambaForCausalLM(config)
    return transformers.AutoModelForCausalLM.from_config(tiny(name).config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name, dtype):
    build, message = REFUSED[name]
    for prepare in (lambda model: model, without_head):
        torch.manual_seed(0)
        model = prepare(build()).to(dtype)
        cls = type(model)
        with pytest.raises(ValueError, match=f"no patch step of {cls.__name__} is exact: .*{message}"):
            hf.enable(model, 4)
        assert type(model) is cls and not any(key.startswith("_patch") for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", [*MODELS, "Mamba"])
def test_what_is_exact_is_enabled(name):
    if "self.loss_function" not in inspect.getsource(type(fresh(name)).forward):  # Mamba in transformers 5.0
        with pytest.raises(ValueError, match=INLINE):
            hf.enable(fresh(name), 4)
        return
    logit_maps = {"Gemma2": LogitMap(1.0, 2.0), "Cohere": LogitMap(0.25), "Granite": LogitMap(0.25)}
    for dtype in DTYPES:
        for prepare in (lambda model: model, without_head):
            model = hf.enable(prepare(fresh(name)).to(dtype), 4)
            assert hf.is_fused(model)
            scale, softcap = model._patch_state.settings.logit_map
            assert (pytest.approx(scale), softcap) == logit_maps.get(name, LogitMap())


def first_tokens(ids, weight, patch_size):
    """The embedding of the first token of every patch, in place of the mean."""
    return weight[ids[:, ::patch_size]]


def two_of_three_tokens(ids, weight, patch_size):
    """Leaves the third token of every patch out of the mean."""
    return weight[ids].unflatten(1, (-1, patch_size))[:, :, :2].mean(2)


def exchanged_losses(*args, linear_patch_cross_entropy=modules.linear_patch_cross_entropy, **options):
    loss, losses = linear_patch_cross_entropy(*args, **options)
    return loss, losses.flip(-1)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("patch_embedding", first_tokens, "different tokens in patches of 2 give "),
        ("patch_embedding", two_of_three_tokens, "different tokens in patches of 3 give "),
        ("linear_patch_cross_entropy", exchanged_losses, "different tokens in patches of 2 give losses of"),
    ],
)
def test_mistakes_in_a_patch_step_are_found(monkeypatch, name, replacement, message):
    monkeypatch.setattr(modules, name, replacement)
    trial, _ = probe_copy.copy_to_try(tiny("Llama", torch.float32))
    with pytest.raises(probe.InexactError, match=message):
        probe.check_step(trial, probe.StepKind(True, LogitMap()))


class Draws(transformers.MixtralForCausalLM):
    """Draws random numbers from all generators whenever it runs, and notes how precise products of matrices are."""

    def forward(self, **inputs):
        precisions_seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        random.random(), numpy.random.rand(), torch.rand(1)  # noqa: NPY002
        return super().forward(**inputs)


def traces(model):
    """All that enabling must not change, in a model and around it: tensors, and what can be compared by ``==``."""
    tensors = {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}
    tensors |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    others = (
        [(tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in tensors.values()],
        [(module.training, *(list(vars(module)[name]) for name in HOOKS)) for module in model.modules()],
        (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision),
        (torch.backends.cudnn.conv.fp32_precision, torch.get_default_dtype(), transformers.logging.get_verbosity()),
        (model.config.to_dict(), torch.get_rng_state().tolist(), random.getstate(), numpy.random.randint(2**31)),  # noqa: NPY002
    )
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, others


@pytest.mark.parametrize("copied", ["whole", "tiny", "truncated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_else_changes(monkeypatch, dtype, copied):
    model = Draws(tiny("Mixtral").config).to(dtype).train()
    ids = torch.randint(3, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()  # also makes transformers install hooks on the routers
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append("forward"))
    model.model.norm.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.lm_head.weight.register_hook(lambda gradient: calls.append("gradient"))
    model.model.layers[0].register_state_dict_post_hook(lambda *_: None)
    if copied != "whole":
        monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    if copied == "truncated":
        monkeypatch.setattr(probe_copy, "small_config", lambda config: 1 / 0)
    torch.set_float32_matmul_precision("high")
    precisions_seen.clear()
    try:
        numpy.random.seed(0)  # noqa: NPY002
        tensors, others = traces(model)
        numpy.random.seed(0)  # noqa: NPY002
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hf.enable(model, 4)
        tensors_after, others_after = traces(model)
        torch.testing.assert_close(tensors_after, tensors, rtol=0, atol=0)
        assert others_after == others
    finally:
        torch.set_float32_matmul_precision("highest")
    assert calls == [] and hf.is_fused(model) and precisions_seen == {("ieee", "ieee")}


def copies_made(monkeypatch):
    """A list to which every copy is added that ``enable`` makes."""
    made, copy_to_try = [], probe.copy_to_try

    def recorded(model):
        made.append(copy_to_try(model))
        return made[-1]

    monkeypatch.setattr(probe, "copy_to_try", recorded)
    return made


def test_the_copy_has_noise_and_shares_what_the_model_shares():
    model = fresh("GPT2").to(torch.float16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trial, is_small = probe_copy.copy_to_try(model)
    assert not is_small and trial.lm_head.weight is trial.transformer.wte.weight
    for name, parameter in trial.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        expected = 0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
        assert 0.5 < parameter.std() / expected < 2, name


@pytest.mark.parametrize("name", MODELS)
def test_a_large_model_is_tried_as_a_tiny_one(monkeypatch, name):
    monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    made = copies_made(monkeypatch)
    model = fresh(name)
    whole = hf.enable(tiny(name), 4)._patch_state.settings.logit_map
    assert hf.enable(model, 4)._patch_state.settings.logit_map == pytest.approx(whole)
    assert all(copied.is_small for copied in made)
    for build, message in (REFUSED[key] for key in ("an inline loss", "later tokens", "a second embedding")):
        with pytest.raises(ValueError, match=message):
            hf.enable(build(), 4)


def wide(cls):
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**GROUPED | {"hidden_size": 64, "intermediate_size": 80}))


def check_loss_of_means(model):
    """Compares a patch step of a model that was enabled with its definition."""
    ids = torch.randint(3, 64, (2, 12))
    with hf.token_level(model), torch.no_grad():
        means = model.get_input_embeddings()(ids).unflatten(1, (-1, 4)).mean(2)
        expected = reference.patch_cross_entropy(model(inputs_embeds=means).logits, next_patch_targets(ids, 4))
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)


def test_the_scale_of_logits_is_that_of_the_large_model(monkeypatch):
    monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    model = hf.enable(wide(WideLogits), 4)
    assert model._patch_state.settings.logit_map == LogitMap(0.5)
    check_loss_of_means(model)
    other = hf.enable(wide(DividesInAModule), 4)  # its width is not looked up in the configuration
    assert not hf.is_fused(other)
    check_loss_of_means(other)
    cohere = fresh("Cohere")
    cohere.logit_scale = 0.5
    assert hf.enable(cohere, 4)._patch_state.settings.logit_map == LogitMap(0.5)
    llama = fresh("Llama")
    llama.loss_function = smoothed
    with pytest.raises(ValueError, match="the mean cross entropy of its logits"):
        hf.enable(llama, 4)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("Llama").config)
    assert hf.is_fused(hf.enable(model, 4))
    filled, ids = tiny("Llama", torch.float32), torch.randint(3, 64, (2, 8))
    model.load_state_dict(filled.state_dict(), assign=True)
    model.model.rotary_emb = filled.model.rotary_emb
    expected = loss_and_gradients(hf.enable(filled, 4), ids, ids)
    torch.testing.assert_close(loss_and_gradients(model.eval(), ids, ids), expected, rtol=0, atol=0)


def check_sharded_model(name):
    """Enables a model after and before it is sharded. Returns the errors of the loss and of the gradients."""
    from torch.distributed.fsdp import fully_shard

    model, other = tiny(name, torch.float32), tiny(name, torch.float32)
    expected = loss_and_gradients(hf.enable(other, 4), ids := torch.randint(3, 64, (2, 8)), ids)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert hf.enable(model, 4) is model and hf.is_fused(model)
    refused = InlineLoss(LLAMA)
    fully_shard(refused)
    with pytest.raises(ValueError, match=INLINE):
        hf.enable(refused, 4)
    changed = tiny(name, torch.float32)
    changed.model.norm = nn.Sequential(changed.model.norm)
    fully_shard(changed)
    with pytest.raises(ValueError, match=r"sharded or quantised\), .* \(only .*model\.norm"):
        hf.enable(changed, 4)
    found = loss_and_gradients(model, ids, ids)
    whole = [getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for tensor in found]
    return [relative_error(a, b) for a, b in zip(whole, expected, strict=True)]


def test_a_model_sharded_by_fsdp2():
    for errors in run(check_sharded_model, 2, "Llama"):
        assert max(errors) < 1e-5, errors


def test_adapters_of_a_large_model(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    monkeypatch.setattr(probe_copy, "LARGEST_TRUNCATED_COPY", 1000)
    made = copies_made(monkeypatch)
    for modules_to_adapt, fused in ((["q_proj", "v_proj"], True), (["q_proj", "lm_head", "embed_tokens"], False)):
        config = peft.LoraConfig(r=2, target_modules=modules_to_adapt, task_type="CAUSAL_LM")
        model = hf.enable(peft.get_peft_model(fresh("Llama"), config), 4)
        assert made[-1].is_small and hf.is_fused(model) == fused
        saved = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        assert not hf.is_fused(hf.enable(peft.get_peft_model(fresh("Llama"), saved), 4)) and made.pop().is_small
        adapted = [[name for name, _ in m.named_parameters() if "lora" in name] for m in (made[-1].model, model)]
        assert len(adapted[0]) == len(adapted[1]) > 0


class ScaledByBuffer(Own):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(config.hidden_size**-0.5))

    def logits(self, input_ids, inputs_embeds):
        return super().logits(input_ids, inputs_embeds) * self.scale


class Biased(Own):
    """With a bias that is loaded after the model was made."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.vocab_size))

    def logits(self, input_ids, inputs_embeds):
        return super().logits(input_ids, inputs_embeds) + self.bias


class Switched(SecondEmbedding):
    is_on = False

    def logits(self, *args):
        return super().logits(*args) if self.is_on else Own.logits(self, *args)


class Late(SecondEmbedding):
    """Uses its second embedding in a model of many layers."""

    def logits(self, *args):
        return super().logits(*args) if len(self.model.layers) > 4 else Own.logits(self, *args)


def test_what_a_large_model_has_beside_its_configuration(monkeypatch):
    """A tiny model of the configuration does not have it, and must not stand for the model."""
    monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    made = copies_made(monkeypatch)
    model = hf.enable(wide(ScaledByBuffer), 4)
    assert made[-1].is_small and model._patch_state.settings.logit_map == LogitMap(64**-0.5)
    check_loss_of_means(model)
    model = wide(Biased)
    nn.init.normal_(model.bias)
    assert not hf.is_fused(hf.enable(model, 4)) and made[-1].is_small
    check_loss_of_means(model)
    model = fresh("Llama")
    model.act = torch.tanh
    assert hf.is_fused(hf.enable(model, 4)) and not made[-1].is_small
    model = fresh("Llama")
    model.set_attn_implementation("sdpa")  # the one that reads this attribute
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="not causal"):
        hf.enable(model, 4)
    model = Switched(LLAMA)
    model.is_on = True
    with pytest.raises(ValueError, match=REPEATED):
        hf.enable(model, 4)
    monkeypatch.setattr(probe_copy, "LARGEST_TRUNCATED_COPY", 1000)
    with pytest.raises(ValueError, match=r"only the model has a model of class Switched .* with is_on = True"):
        hf.enable(model, 4)
    with pytest.raises(ValueError, match="does not use second, which may be of tokens"):
        hf.enable(Late(transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 8})), 4)


class Int8Linear(nn.Module):
    """Stands for a linear layer whose weights are whole numbers."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input):
        return F.linear(input, self.weight * self.scale)


def test_a_quantised_model():
    model = fresh("Llama")
    model.is_quantized = True
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    assert hf.is_fused(hf.enable(model, 4))
    check_loss_of_means(model)
    other = fresh("Llama")
    other.model.layers[0].mlp.down_proj = Int8Linear(other.model.layers[0].mlp.down_proj)
    with pytest.raises(ValueError, match=r"cannot be found out: .* \(only the model has .*down_proj.*Int8Linear"):
        hf.enable(other, 4)


class Norm(nn.RMSNorm):
    """A layer of the user's, in place of one of transformers."""


def replaced_norms(cls, layers):
    torch.manual_seed(0)
    model = cls(transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 6}))
    for i in layers:
        model.model.layers[i].input_layernorm = Norm(32)
    return model


def test_a_large_model_with_other_modules_is_tried_without_some_layers(monkeypatch):
    monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    made = copies_made(monkeypatch)
    model = replaced_norms(transformers.LlamaForCausalLM, (2, 4))
    hf.enable(model, 4)
    ((trial, is_small),) = made
    assert hf.is_fused(model) and not is_small and len(trial.model.layers) == 3 and len(model.model.layers) == 6
    assert type(trial.model.layers[2].input_layernorm) is Norm
    with pytest.raises(ValueError, match=INLINE):
        hf.enable(replaced_norms(InlineLoss, (0,)), 4)
    monkeypatch.setattr(probe_copy, "LARGEST_TRUNCATED_COPY", 1000)
    with pytest.raises(ValueError, match=r"more than 1,000\), .*Norm.* enable the model before it is sharded"):
        hf.enable(replaced_norms(transformers.LlamaForCausalLM, (2, 4)), 4)


def test_forwards_that_were_replaced_on_the_instance():
    model, called = fresh("Llama"), []
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden, original=mlp.forward: called.append(1) or original(hidden)
    with pytest.raises(ValueError, match=r"forward of a LlamaMLP was replaced on the instance by a function"):
        hf.enable(model, 4)
    mlp.forward = types.MethodType(lambda self, hidden: type(self).forward(self, hidden) * 2, mlp)
    hf.enable(model, 4)
    assert called == []
    check_loss_of_means(model)
    other = fresh("Llama")
    other.forward = types.MethodType(lambda self, **inputs: type(self).forward(self, **inputs), other)
    with pytest.raises(ValueError, match="its forward was replaced on the instance"):
        hf.enable(other, 4)


def test_hooks_of_the_user_on_the_head_and_the_embedding():
    model = fresh("Llama")
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: logits / 2)
    model.get_input_embeddings().register_forward_hook(lambda module, args, embedded: embedded * 3)
    hf.enable(model, 4)
    assert not hf.is_fused(model) and type(model.get_input_embeddings()) is nn.Embedding
    check_loss_of_means(model)
    hook.remove()
    check_loss_of_means(model)


def test_a_large_model_whose_tables_have_several_names(monkeypatch):
    monkeypatch.setattr(probe_copy, "LARGEST_COPY", 1000)
    config = transformers.CamembertConfig(**BERT | {"num_hidden_layers": 6, "pad_token_id": 1}, is_decoder=True)
    made = copies_made(monkeypatch)
    assert hf.is_fused(hf.enable(transformers.CamembertForCausalLM(config), 4)) and made[-1].is_small


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_with_checkpoints_of_activations(reentrant):
    model, expected = fresh("Llama").train(), fresh("Llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    hf.enable(model, 4)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    ids = torch.randint(3, 64, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    hf.enable(expected, 4)(input_ids=ids, labels=ids).loss.backward()
    for found, wanted in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(found.grad, wanted.grad)
