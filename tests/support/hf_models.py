"""Tiny causal language models of transformers, with larger weights than fresh models have, and their gradients."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "output_router_logits": True, "router_aux_loss_coef": 0.1}  # fmt: skip
# the settings by name; the loss of all of these is fused into their head
MODELS = {
    "Llama": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Phi": COMMON,  # a bias in the head
    "Cohere": {**GROUPED, "logit_scale": 0.25},
    "Granite": {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": COMMON,
    "Mixtral": {**GROUPED, **MOE},
    "Qwen3Moe": {**GROUPED, **MOE, "head_dim": 8},
    "OPT": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def tiny(name: str, dtype: torch.dtype = torch.float64):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(
        {"Qwen3Moe": "qwen3_moe", "Gemma3": "gemma3_text", "GPTNeoX": "gpt_neox"}.get(name, name.lower()),
        **MODELS[name], **special,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} | (
        {"experts_implementation": "eager"} if "output_router_logits" in MODELS[name] else {}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():  # biases included
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def loss_and_gradients(model, ids, labels):
    """The loss of a step on the batch, and the gradients of the parameters that have one."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
