"""The small copy of a configuration builds the same architecture as the large one, and it runs."""

from __future__ import annotations

import re

import pytest
import torch
from hf_models import transformers

from patchkernels.hf.small_config import LAYERS, VOCABULARY, small_config

# The settings of published models, as far as they are not the defaults of their classes.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
             "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}  # fmt: skip
PUBLISHED = {
    "Llama 3.2 1B": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008], "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE,
        "max_position_embeddings": 131072}),
    "SmolLM 135M": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "bos_token_id": 0, "eos_token_id": 0}),
    "Phi 3 mini 128k": ("phi3", {
        "rope_parameters": LONG_ROPE, "max_position_embeddings": 131072, "sliding_window": 262144}),
    "Phi 4 mini": ("phi3", {
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True,
        "rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.75,
        "pad_token_id": 199999, "bos_token_id": 199999, "eos_token_id": 199999}),
    "Phi 2": ("phi", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "num_hidden_layers": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        "pad_token_id": None}),
    "Gemma 2 2B": ("gemma2", {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256}),
    "Gemma 3 1B": ("gemma3_text", {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}),
    "Qwen 2.5 0.5B": ("qwen2", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "use_sliding_window": False, "max_window_layers": 21, "tie_word_embeddings": True}),
    "Qwen 3 30B-A3B": ("qwen3_moe", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "mlp_only_layers": [0, 5],
        "output_router_logits": True}),
    "Qwen 3 Next": ("qwen3_next", {}),
    "Mixtral 8x7B": ("mixtral", {"output_router_logits": True}),
    "DeepSeek V3": ("deepseek_v3", {"rope_parameters": YARN}),
    "Llama 4 Scout": ("llama4_text", {"interleave_moe_layer_step": 2}),
    "gpt-oss 20B": ("gpt_oss", {}),
    "GPT-2 XL": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "GPT-Neo 2.7B": ("gpt_neo", {
        "hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]]}),
    "GPT-NeoX 20B": ("gpt_neox", {}),
    "Falcon 7B": ("falcon", {"multi_query": True, "parallel_attn": True}),
    "Falcon 40B": ("falcon", {
        "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}),
    "OPT 350M": ("opt", {
        "hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "do_layer_norm_before": False}),
    "BLOOM 560M": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
    "Mamba 130M": ("mamba", {"hidden_size": 768, "num_hidden_layers": 24}),
    "Mamba 2 2.7B": ("mamba2", {
        "hidden_size": 2560, "num_heads": 80, "head_dim": 64, "n_groups": 1, "num_hidden_layers": 64,
        "vocab_size": 50288}),
    "Jamba": ("jamba", {"use_mamba_kernels": False}),
    "Bamba 9B": ("bamba", {"attn_layer_indices": [9, 18, 27]}),
    "Nemotron-H 8B": ("nemotron_h", {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-"}),
    "Zamba 2": ("zamba2", {"num_mem_blocks": 2}),
    "Gemma 3n": ("gemma3n_text", {}),
    "Gemma 3 4B": ("gemma3", {}),
    "Qwen 4 with n-grams": ("qwen4_exp_text", {
        "ple_layer_ids": [2, 30], "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 128,
        "indexer_budget": 2048, "indexer_compress_ratio": 16, "ngram_vocab_size_base": 1000, "split_ngram_parts": 1,
        "eos_token_id": 248044,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}}),
}  # fmt: skip
UNBUILDABLE = {"5.0.0": ("Zamba 2",)}  # at full size too, by version of transformers
# These count as one structure: a list of layers of one kind has the same classes under the same names.
NUMBER = re.compile(r"\.\d+(?=\.|$)")


def published(name):
    kind, settings = PUBLISHED[name]
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if name in UNBUILDABLE.get(transformers.__version__, ()):
        pytest.skip(f"transformers {transformers.__version__} builds no {kind}")
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.get_text_config().use_cache = False
    return config


def build(config):
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def structure(model):
    names = [(NUMBER.sub("", name), type(module)) for name, module in model.named_modules()]
    return set(names) | {NUMBER.sub("", name) for name, _ in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_small_model_has_the_structure_of_the_large_one_and_runs(name):
    config = published(name)
    before = config.to_dict()
    small = small_config(config)
    assert config.to_dict() == before
    assert type(small) is type(config)
    with torch.device("meta"):
        large = structure(build(config))
    torch.manual_seed(0)
    model = build(small).float().eval()
    assert structure(model) == large
    assert sum(parameter.numel() for parameter in model.parameters()) < 400_000
    ids = torch.randint(3, 32, (2, 12))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()


def unlike(large, small):
    """The fields that are no sizes and differ in two configurations, also in the configurations inside them."""
    found = []
    for name, value in vars(large).items():
        if hasattr(value, "get_text_config"):
            found += unlike(value, getattr(small, name))
        elif isinstance(value, bool | str | float | None) and vars(small)[name] != value:
            found.append(name)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_sizes_change(name):
    config = published(name)
    config.initializer_range = 0.123
    small = small_config(config)
    assert unlike(config, small) == []
    large, small = config.get_text_config(), small.get_text_config()
    for field in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if getattr(large, field, None):
            assert set(getattr(small, field)) == set(getattr(large, field))
    for field, value in vars(small).items():
        if field.endswith("token_id") and value is not None:
            assert all(token < VOCABULARY for token in (value if isinstance(value, list) else [value]))
    both = [c for c in (large, small) if getattr(c, "num_key_value_heads", None)]
    heads = {(c.num_key_value_heads == c.num_attention_heads, c.num_key_value_heads == 1) for c in both}
    assert len(heads) <= 1  # a key for every query, or for several, or one


def test_what_lists_say_of_layers_is_kept_together():
    settings = {"num_hidden_layers": 12, "mlp_only_layers": [4, 11]}
    config = transformers.Qwen3MoeConfig(layer_types=["sliding_attention", "full_attention"] * 6, **settings)
    small = small_config(config)
    kinds = {(kind, i in small.mlp_only_layers) for i, kind in enumerate(small.layer_types)}
    assert kinds == {(kind, dense) for kind in ("sliding_attention", "full_attention") for dense in (False, True)}
    assert small.num_hidden_layers == len(small.layer_types) == 6  # one of each with a dense block, else two
    shared = small_config(transformers.Gemma3nTextConfig())
    assert 0 < shared.num_kv_shared_layers < shared.num_hidden_layers == len(shared.intermediate_size)
    assert len(small_config(transformers.LlamaConfig()).to_dict()) == len(transformers.LlamaConfig().to_dict())
    assert small_config(transformers.LlamaConfig()).num_hidden_layers == LAYERS
    assert small_config(transformers.LlamaConfig(num_hidden_layers=1)).num_hidden_layers == 1


def test_a_tiny_configuration_stays_as_it_is():
    tiny = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 3, "intermediate_size": 20, "max_position_embeddings": 32}  # fmt: skip
    for config in (transformers.LlamaConfig(**tiny), transformers.MistralConfig(**tiny, sliding_window=8)):
        assert small_config(config).to_dict() == config.to_dict()


def test_quantised_weights_are_not_asked_for():
    config = transformers.LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert not hasattr(small_config(config), "quantization_config")


def test_sections_of_rotary_positions_fill_the_head():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
    small = small_config(transformers.Qwen3NextConfig(head_dim=256, rope_parameters=rope))
    sections = small.rope_parameters["mrope_section"]
    assert all(sections) and 2 * sum(sections) == int(small.head_dim * 0.25)
