"""A small copy of a model's configuration: the same architecture with sizes that take milliseconds to run.

:func:`small_config` serves to look at a large model without running it. A model that is built from the copy runs the
same code as the large one: the copy keeps all flags, activations, scales, biases, kinds of attention and kinds of
layers, and changes nothing but sizes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 4, 64

# The names of the fields of transformers' configurations that are sizes, by how their small values are chosen.
WIDTHS = (
    "hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "embedding_dim", "dim", "dim_model",
    "attention_hidden_size", "backbone_hidden_size", "embedding_size", "encoder_hidden_size", "hidden_size_global",
    "input_embedding_size", "lru_width", "out_hidden_size", "output_embedding_size", "ple_embed_dim",
    "vision_output_dim", "word_embed_proj_dim",
)  # fmt: skip
QUERY_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
    "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
    "swa_num_attention_heads", "num_attention_heads_per_layer",
)  # fmt: skip
KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_global_key_value_heads",
)  # fmt: skip
MAMBA_HEADS = {  # numbers of heads of state space models, and the sizes of these heads
    "mamba_n_heads": "mamba_d_head", "mamba_num_heads": "mamba_head_dim", "n_mamba_heads": "mamba_headdim",
    "num_heads": "head_dim",
}  # fmt: skip
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack", "depth",
)  # fmt: skip
# Lists of layers, and the number that they give to the first layer.
LAYER_INDICES = {
    "attn_layer_indices": 0, "cross_attention_layers": 0, "full_attn_idxs": 0, "global_attn_indexes": 0,
    "hybrid_layer_ids": 0, "mlp_only_layers": 0, "moe_layers": 0, "ple_layer_ids": 1,
}  # fmt: skip
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")  # numbers of layers at the beginning that differ
LAST_LAYERS = ("num_kv_shared_layers",)  # and at the end
# These lists do not hold a value for each layer, even if they are as long as the model is deep.
OTHER_LISTS = ("architectures", "mlp_multipliers", "ssm_multipliers", "time_step_limit")
LARGEST = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY, "audio_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY,
    "shape_vocab_size": VOCABULARY, "encoder_hash_byte_group_vocab": VOCABULARY, "ngram_vocab_size_base": VOCABULARY,
    "intermediate_size": 48, "intermediate_size_mlp": 48, "dense_intermediate_size": 48, "feed_forward_size": 48,
    "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48, "n_inner": 48, "d_inner": 48,
    "dff": 48, "dim_ff": 48, "mlp_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1,
    "global_head_dim": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "o_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "rotary_dim": 4, "kv_channels": 8, "dim_head": 8, "d_head": 8,
    "swa_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    "indexer_head_dim": 8, "indexer_n_heads": 2, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8,
    "adapter_rank": 8,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "time_step_rank": 4, "mamba_dt_rank": 4, "n_groups": 2,
    "mamba_n_groups": 2, "mamba_ngroups": 2, "linear_num_heads": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "max_source_positions": 64,
    "max_target_positions": 64, "sliding_window": 64,
    "hidden_size_per_layer_input": 8, "image_size": 28, "patch_size": 14, "mm_tokens_per_image": 4,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "decoder_sparse_step": 2,
    "moe_layer_interval": 2, "moe_layer_start_index": 1, "router_hidden_size": 16,
}  # fmt: skip


class Attention(NamedTuple):
    """Width, number of heads and size of a head, in a configuration and in its small copy; 0 where it has none."""

    old_width: int
    width: int
    old_heads: int
    heads: int
    old_dim: int
    dim: int


def small_config(config: Any) -> Any:
    """A copy of a transformers configuration in which sizes are small and everything else is as it was.

    There stay as many heads of keys as of queries, or fewer, or one. The layers are the first of each kind, so that
    every combination of what the lists of the configuration say about a layer occurs. Special tokens are inside the
    small vocabulary and as distinct as before. Values that are small already, 0 and None are kept. A configuration of
    quantised weights loses its ``quantization_config``. The argument is not changed.
    """
    outside = [token for token in sorted(special_tokens(config)) if token >= VOCABULARY]
    moved = {token: VOCABULARY - 1 - i % (VOCABULARY // 2) for i, token in enumerate(outside)}
    return shrink(config, moved)


def special_tokens(config: Any) -> set[int]:
    """The ids of all special tokens that a configuration names, also in the configurations inside it."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if is_config(value):
            found |= special_tokens(value)
        elif is_token(name):
            found |= {token for token in (value if isinstance(value, list | tuple) else [value]) if is_size(token)}
    return found


def shrink(config: Any, moved: dict[int, int], heads: tuple[int, int] = (0, 0)) -> Any:
    """The small copy of one configuration; ``heads`` (large, small) are those of the one around it."""
    ignored = ("quantization_config", "id2label", "label2id", "transformers_version", "ignore_keys_at_rope_validation")
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in ignored}
    inner = {name: fields.pop(name) for name in list(fields) if is_config(fields[name])}
    fields = copy.deepcopy(fields)
    attention = small_attention(fields, heads)
    small = small_fields(fields, attention, moved)
    # Layers of some models have values of their own, which override those of the model.
    own = {int(layer): values for layer, values in config.to_dict().get("per_layer_config", {}).items()}
    if own:
        layers = [{**fields, **own.get(layer, {})} for layer in range(fields["num_hidden_layers"])]
        layers = [small_fields(layer, small_attention(layer, heads), moved) for layer in layers]
        small["per_layer_config"] = [{name: layer[name] for name in own.get(i, {})} for i, layer in enumerate(layers)]
    small |= small_layers(small)
    if own:
        small["per_layer_config"] = {i: values for i, values in enumerate(small["per_layer_config"]) if values}
    small |= {name: shrink(value, moved, (attention.old_heads, attention.heads)) for name, value in inner.items()}
    return type(config)(**small)


def small_fields(fields: dict[str, Any], attention: Attention, moved: dict[int, int]) -> dict[str, Any]:
    """The small values of all fields but of those that depend on the number of layers."""
    small = {name: small_value(name, value, moved) for name, value in fields.items()}
    small |= small_widths(fields, attention)
    small |= small_heads(fields, attention)
    small |= small_mamba(fields, attention)
    if isinstance(fields.get("rope_parameters"), dict):
        small["rope_parameters"] = small_rope(fields["rope_parameters"], attention)
    return small


def is_config(value: Any) -> bool:
    return hasattr(value, "get_text_config")


def is_token(name: str) -> bool:
    return name.endswith(("token_id", "token_ids", "token_index"))


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_mamba(name: str, fields: dict[str, Any]) -> bool:
    """Whether a field is about the heads of a state space model, which may be called ``num_heads`` and ``head_dim``."""
    return name.startswith(("mamba", "n_mamba")) or (name in ("num_heads", "head_dim") and "state_size" in fields)


def small_value(name: str, value: Any, moved: dict[int, int]) -> Any:
    """The small value of a field that depends on no other field. A list holds a value for each layer or token."""
    if isinstance(value, list | tuple):
        return type(value)(small_value(name, item, moved) for item in value)
    if not is_size(value):
        return value
    return moved.get(value, value) if is_token(name) else min(value, LARGEST.get(name, value))


def small_attention(fields: dict[str, Any], outer: tuple[int, int]) -> Attention:
    """The sizes of heads, such that the part of a head that is rotated is even and has a value for each section of
    several kinds of positions. If heads times their size is the width in the large model, so it is in the small one.
    """
    width = next((fields[name] for name in WIDTHS if is_size(fields.get(name))), 0)
    names = [name for name in QUERY_HEADS if is_size(fields.get(name)) and not is_mamba(name, fields)]
    if not width or not names:
        return Attention(width, min(width, WIDTH), *outer, 0, 0)
    heads = fields[names[0]]
    dim = fields["head_dim"] if is_size(fields.get("head_dim")) else width // heads
    if width <= WIDTH and dim <= WIDTH:
        return Attention(width, width, heads, heads, dim, dim)
    few = heads if heads <= 2 or width <= WIDTH else HEADS if heads >= HEADS else 2
    fractions = {1.0, *values_of(fields, "partial_rotary_factor"), *values_of(fields, "rotary_pct")}
    sections = max((len(section) for section in values_of(fields, "mrope_section")), default=1)
    small_dim = next(
        size
        for size in range(WIDTH // min(few, HEADS), 1024, 2)
        if all(int(size * fraction) % 2 == 0 and int(size * fraction) // 2 >= sections for fraction in fractions)
    )
    small_width = min(width, few * small_dim if heads * dim == width else WIDTH)
    return Attention(width, small_width, heads, few, dim, small_dim)


def values_of(fields: dict[str, Any], name: str) -> list[Any]:
    """The values that stand under a name in a dictionary and in those inside it."""
    found = [fields[name]] if fields.get(name) else []
    for value in fields.values():
        found += values_of(value, name) if isinstance(value, dict) else []
    return found


def small_widths(fields: dict[str, Any], attention: Attention) -> dict[str, Any]:
    """The widths, whose ratios to each other are those in the large model if these are whole numbers."""
    small: dict[str, Any] = {}
    old, new = attention.old_width, attention.width
    for name in WIDTHS:
        value: Any = fields.get(name)
        if not is_size(value) or old == new:
            continue
        if value % old == 0:
            small[name] = value // old * new
        elif old % value == 0:
            small[name] = max(new // (old // value), 8)
        else:
            small[name] = min(value, new * 3 // 4 if value < old else new * 3 // 2)
    if fields.get("axial_pos_embds_dim"):  # of Reformer: parts whose sum is the width
        small["axial_pos_embds_dim"] = [part * new // old for part in fields["axial_pos_embds_dim"]]
    return small


def small_heads(fields: dict[str, Any], attention: Attention) -> dict[str, Any]:
    """The numbers of heads of attention, and their sizes where the configuration says them."""
    small: dict[str, Any] = {}
    old_heads, heads = attention.old_heads, attention.heads
    for name in QUERY_HEADS:
        value: Any = fields.get(name)
        if value and not is_mamba(name, fields):
            small[name] = [heads for _ in value] if isinstance(value, list) else heads
    for name in KEY_HEADS:
        value = fields.get(name)
        if is_size(value):
            small[name] = 1 if value == 1 else heads if value == old_heads else max(heads // 2, 1)
    if is_size(fields.get("attention_head_dim")) and heads:  # attention may be wider than the model
        ratio = fields["attention_head_dim"] * old_heads // attention.old_width
        small["attention_head_dim"] = max(ratio, 1) * attention.width // heads
    if is_size(fields.get("qk_head_dim")):
        small["qk_head_dim"] = LARGEST["qk_rope_head_dim"] + LARGEST["qk_nope_head_dim"]
    if not is_size(fields.get("head_dim")) or is_mamba("head_dim", fields):
        return small
    small["head_dim"] = attention.dim
    rotated, rest = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")  # of latent attention
    if rotated and rest:
        small_rotated, both = LARGEST["qk_rope_head_dim"], LARGEST["qk_rope_head_dim"] + LARGEST["qk_nope_head_dim"]
        small["head_dim"] = {rotated: small_rotated, rest + rotated: both}.get(attention.old_dim, attention.dim)
    elif rotated:
        small["qk_rope_head_dim"] = max(rotated * attention.dim // attention.old_dim, 2)
    return small


def small_mamba(fields: dict[str, Any], attention: Attention) -> dict[str, int]:
    """The numbers of heads of state space models and their sizes, whose product usually is a multiple of the width."""
    small: dict[str, int] = {}
    expand = fields.get("mamba_expand") or fields.get("expand") or 0
    for name, dim in MAMBA_HEADS.items():
        heads: Any = fields.get(name)
        size: Any = fields.get(dim)
        if not is_size(heads) or not is_mamba(name, fields):
            continue
        small[name] = few = heads if heads in (1, 2, 4) else 2 * HEADS
        if is_size(size):
            fills = heads * size == expand * attention.old_width
            small[dim] = int(expand * attention.width) // few if fills else LARGEST["state_size"]
            if is_size(fields.get("mamba_d_ssm")):
                small["mamba_d_ssm"] = few * small[dim]
    return small


def small_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The number of layers and all that depends on it: the layers that are kept are the first ones of each kind."""
    counts = {name: fields[name] for name in LAYER_COUNTS if is_size(fields.get(name))}
    lists = [fields[name] for name in ("layer_types", "layers_block_type") if fields.get(name)]
    depth = next(iter(counts.values()), len(lists[0]) if lists else 0)
    by_layer = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == depth and name not in (*OTHER_LISTS, *LAYER_INDICES)
    }
    indices = {
        name: [number - base for number in fields[name]]
        for name, base in LAYER_INDICES.items()
        if fields.get(name) is not None
    }
    first = {name: fields[name] for name in FIRST_LAYERS if is_size(fields.get(name))}
    last = {name: fields[name] for name in LAST_LAYERS if is_size(fields.get(name))}

    def kind(layer: int) -> str:
        lists_say = [value[layer] for value in by_layer.values()], [layer in value for value in indices.values()]
        return repr((*lists_say, [layer < n for n in first.values()], [layer >= depth - n for n in last.values()]))

    kinds = [kind(layer) for layer in range(depth)]
    firsts = [layer for layer in range(depth) if kinds[:layer].count(kinds[layer]) < 2]  # two may share their weights
    others = [layer for layer in range(depth) if layer not in firsts]
    kept = sorted([*firsts, *others[: max(LAYERS - len(firsts), 0)]])
    small: dict[str, Any] = {name: len(kept) if n == depth else min(n, 2) for name, n in counts.items()}
    small |= {name: type(value)(value[layer] for layer in kept) for name, value in by_layer.items()}
    small |= {
        name: [number for number, layer in enumerate(kept, LAYER_INDICES[name]) if layer in value]
        for name, value in indices.items()
    }
    small |= {name: sum(layer < n for layer in kept) for name, n in first.items()}
    small |= {name: sum(layer >= depth - n for layer in kept) for name, n in last.items()}
    if "attention_types" in fields:  # of GPT-Neo: how often a list of kinds is repeated
        small["attention_types"] = [[[kind], 1] for kind in small["attention_layers"]]
    if "num_layers_per_stack" in counts:  # of HRM: the number of layers counts how often the stacks run
        small["num_hidden_layers"] = depth // counts["num_layers_per_stack"] * small["num_layers_per_stack"]
    return small


def small_rope(parameters: dict[str, Any], attention: Attention) -> dict[str, Any]:
    """The parameters of rotary positions, of which some are lists with a value for each rotated pair of a head."""
    small: dict[str, Any] = {}
    fraction = parameters.get("partial_rotary_factor") or 1.0
    old_pairs, pairs = (int(dim * fraction) // 2 for dim in (attention.old_dim, attention.dim))
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = small_rope(value, attention)
        elif name in ("short_factor", "long_factor") and pairs:
            small[name] = value[:: max(old_pairs // pairs, 1)][:pairs]
        elif name == "mrope_section" and pairs:
            small[name] = [pairs // len(value) + (i < pairs % len(value)) for i in range(len(value))]
        else:
            small[name] = value
    return small
