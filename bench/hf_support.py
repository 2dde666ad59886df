"""Which causal language models of the installed transformers take patch steps: every one at a tiny size.

    python -m bench.hf_support                        writes docs/hf-support.md
    python -m bench.hf_support --out "" llama gemma2  prints the rows of some

A model's token loss and gradients, unmodified, against its loss and gradients on every token K times in patches; and
the loss of random tokens against one formed by hand from mean embeddings. Exit code 1 if a model that was enabled
is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import patchkernels
from patchkernels import hf, next_patch_targets, reference

CHECKOUT = Path(patchkernels.__file__).parents[1]
# transformers imports whatever answers to "kernels"; with the package imported, the checkout may leave the path
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]

PATCH_SIZE = 3
TOLERANCE = 1e-4  # relative; fp32 models, and transformers takes its own loss in fp32
LARGEST = 100_000_000  # parameters

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32, "n_layer": 2,
    "num_layers": 2, "n_layers": 2, "num_hidden_layers": 4, "num_decoder_layers": 2, "decoder_layers": 2,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_d_ssm": 64, "rotary_dim": 4, "sliding_window": 64, "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8, "attention_hidden_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "n_groups": 1, "conv_kernel": 2, "expand": 2, "time_step_rank": 4, "use_cache": False,
    "num_kv_shared_layers": 0, "image_size": 28, "patch_size": 14, "depth": 2, "out_hidden_size": 32,
    "vision_output_dim": 32, "num_global_layers": 2, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    "encoder_hidden_size": 32, "mm_tokens_per_image": 4, "layerdrop": 0.0,
}  # fmt: skip
# what the table above does not make a whole model of
ABSENT = object()
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gpt_neo": {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": ABSENT},
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": ABSENT},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 12},
    "zaya": {"num_experts_per_tok": 1},
}
UNSET = ("n_inner", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")  # even where they are None


@dataclass
class Row:
    """One model type: what it is, and how far its patch steps are from exact."""

    kind: str
    architecture: str
    verdict: str  # fused, materialised, refused, not built, wrong
    loss: float = float("nan")
    gradient: float = float("nan")
    random: float = float("nan")
    reason: str = ""


def tiny(kind: str, architecture: str) -> Any:
    """The configuration of the architecture at a tiny size."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # of several, the causal model may take the text's alone
    own = getattr(transformers, architecture).config_class
    config = shrink(own if own is not None else CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def shrink(cls: Any, special: dict[str, Any]) -> Any:
    """The configuration with the fields that it has of the table above, and those within it."""
    default = cls()
    fields: dict[str, Any] = {}
    for name, value in SMALL.items():
        fixed = isinstance(getattr(cls, name, None), property) and getattr(cls, name).fset is None
        try:
            present = hasattr(default, name) and not fixed
            given = present and (getattr(default, name) is not None or name in UNSET)
        except Exception:  # a field that differs from layer to layer
            continue
        if given:
            fields[name] = value
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # of latent attention's rotary part
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name in getattr(cls, "sub_configs", {}):
        if name not in special and getattr(default, name, None) is not None:
            fields[name] = shrink(type(getattr(default, name)), {}).to_dict()
    layers = vars(default).get("layer_types")
    if layers and "layer_types" not in special:
        kinds = list(dict.fromkeys(layers))  # one layer of each kind at least
        fields["layer_types"] = (kinds * 4)[: max(4, len(kinds))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return cls(**{name: value for name, value in {**fields, **special}.items() if value is not ABSENT})


def build(architecture: str, config: Any) -> Any:
    """In fp64 where the model can, weights far from the small numbers of a fresh one."""
    import transformers

    make = getattr(transformers, architecture)._from_config
    with torch.device("meta"):
        count = sum(p.numel() for p in make(config, attn_implementation="eager").parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters: the tiny configuration is not tiny")
    torch.manual_seed(0)
    model = make(config, attn_implementation="eager")
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def loss_and_gradients(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.item(), [p.grad.double().clone() for p in model.parameters() if p.grad is not None]


def judge(kind: str, architecture: str, model: Any) -> Row:
    """Enables the model and compares; what :func:`patchkernels.hf.enable` says of it, or ``wrong``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 6), generator=generator)
    labels = ids.clone()
    labels[0, :2] = -100
    try:
        loss, gradients = loss_and_gradients(model, ids, labels)
        many = torch.randint(3, 64, (2, 6 * PATCH_SIZE), generator=generator)
        means = model.get_input_embeddings()(many).unflatten(1, (-1, PATCH_SIZE)).mean(2)
        with torch.no_grad():
            targets = next_patch_targets(many, PATCH_SIZE)
            by_hand = float(reference.patch_cross_entropy(model(inputs_embeds=means).logits.float(), targets))
    except Exception as error:
        loss, gradients, by_hand = float("nan"), [], float("nan")
        own = f"{type(error).__name__}: {error}"
    else:
        own = ""
    try:
        hf.enable(model, PATCH_SIZE)
    except Exception as error:
        return Row(kind, architecture, "refused", reason=f"{type(error).__name__}: {error}")
    if own:
        return Row(kind, architecture, "not built", reason=f"its own loss or gradients fail: {own}")
    repeated = (t.repeat_interleave(PATCH_SIZE, 1) for t in (ids, labels))
    found, ours = loss_and_gradients(model, *repeated)
    model.zero_grad()
    with torch.no_grad():
        random = model(input_ids=many, labels=many).loss.item()
    if len(ours) != len(gradients):
        return Row(kind, architecture, "wrong", reason=f"{len(ours)} gradients, {len(gradients)} of the tokens")
    size = sum(float(g.norm() ** 2) for g in gradients) ** 0.5
    distance = sum(float((a - b).norm() ** 2) for a, b in zip(ours, gradients)) ** 0.5
    errors = (abs(found / loss - 1), distance / size, abs(random / by_hand - 1))
    if auxiliary(model):  # MoE losses are in the model's loss and not in the one formed by hand
        errors = (*errors[:2], float("nan"))
    verdict = "fused" if model._patch.map is not None else "materialised"
    if not all(error != error or error <= TOLERANCE for error in errors) or errors[0] != errors[0]:
        verdict = "wrong"
    return Row(kind, architecture, verdict, *errors)


def auxiliary(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def examine(kind: str, architecture: str) -> Row:
    try:
        model = build(architecture, tiny(kind, architecture))
    except Exception as error:
        return Row(kind, architecture, "not built", reason=f"{type(error).__name__}: {error}")
    return judge(kind, architecture, model)


def table(rows: list[Row]) -> str:
    """The page."""
    import transformers

    counts = Counter(row.verdict for row in rows)
    exact = counts["fused"] + counts["materialised"]
    lines = [
        "# Models of Hugging Face transformers", "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, {datetime.date.today()}; made by "
        "`python -m bench.hf_support`.", "",
        f"Of {len(rows)} model types with a causal language model: {exact} exact ({counts['fused']} fused, "
        f"{counts['materialised']} materialised), {counts['refused']} refused, {counts['not built']} not built at a "
        f"tiny size, {counts['wrong']} wrong.", "",
        "Each is built at a tiny size with random weights. *loss* and *gradients*: the relative error of a step on "
        f"every token {PATCH_SIZE} times in patches of {PATCH_SIZE} against the unmodified model's on the tokens once "
        "(all gradients as one vector); *random*: of the loss of random tokens against one formed by hand from mean "
        "embeddings (not where the model adds a loss of its own). In fp32. What counts for a model of other settings "
        "is what `enable` says of it.", "",
        "| model type | class | | loss | gradients | random | reason |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        errors = [f"{e:.0e}" if e == e else "" for e in (row.loss, row.gradient, row.random)]
        reason = " ".join(row.reason.split()).replace("|", "\\|")
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        lines.append(f"| {row.kind} | {row.architecture} | {row.verdict} | {' | '.join(errors)} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all by default")
    parser.add_argument("--out", default=str(CHECKOUT / "docs" / "hf-support.md"))
    arguments = parser.parse_args()
    unknown = set(arguments.kinds) - set(NAMES)
    if unknown:
        parser.error(f"no causal language model of this transformers: {sorted(unknown)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for kind, name in sorted(NAMES.items()):
        if not arguments.kinds or kind in arguments.kinds:
            rows.append(examine(kind, name[0] if isinstance(name, list | tuple) else name))
            print(f"{len(rows):>4} {rows[-1]}", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(table(rows))
    print(Counter(row.verdict for row in rows))
    return int(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
