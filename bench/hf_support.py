"""Tests which causal language models of the installed transformers can take patch steps, each at a tiny size.

    python bench/hf_support.py                        writes docs/hf-support.md
    python bench/hf_support.py --out "" llama gemma2  only prints what it finds, for some model types

Run it as a script, with patchkernels installed, so that the checkout is not on ``sys.path``: transformers imports any
module named ``kernels``, and the checkout has a folder of that name.

Every model takes two checks. If each token is repeated K times, loss and gradients in patches of K must be those of the
unmodified model on the tokens once. On random tokens, the loss must be the one that is computed here from mean
embeddings. The exit code is 1 if a model that could be enabled fails a check.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchkernels import hf, next_patch_targets, reference
from patchkernels.numerics import IGNORE_INDEX

CHECKOUT = Path(__file__).resolve().parents[1]
PATCH_SIZE = 3
TOLERANCE = 1e-4  # relative, for models in fp32
MAX_PARAMETERS = 100_000_000

# Small values. A tiny model gets those for which its configuration has a field.
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
ABSENT = object()  # stands for a field that keeps its default
# Values for model types that cannot be built from the table above.
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
# Fields that are set even where the default is None.
UNSET = ("n_inner", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")


@dataclass
class Row:
    """The result for one model type: a row of the table on the page."""

    kind: str
    architecture: str
    verdict: str  # fused, materialised, refused, not built, wrong
    loss: float = float("nan")  # relative errors, NaN where there is nothing to compare
    gradient: float = float("nan")
    random: float = float("nan")
    reason: str = ""


def tiny(kind: str, architecture: str) -> Any:
    """The configuration of the architecture at a tiny size."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # A model type may have a configuration for several kinds of input, and its causal model one for text alone.
    config_class = getattr(transformers, architecture).config_class
    config = shrink(config_class if config_class is not None else CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def shrink(cls: Any, special: dict[str, Any]) -> Any:
    """A configuration of the class ``cls`` with the values of ``SMALL``, also in the configurations inside it."""
    default = cls()
    fields: dict[str, Any] = {}
    for name, value in SMALL.items():
        fixed = isinstance(getattr(cls, name, None), property) and getattr(cls, name).fset is None
        try:
            present = hasattr(default, name) and not fixed
            wanted = present and (getattr(default, name) is not None or name in UNSET)
        except Exception:  # a field that differs from layer to layer
            continue
        if wanted:
            fields[name] = value
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # latent attention rotates a part of each head only
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name in getattr(cls, "sub_configs", {}):
        if name not in special and getattr(default, name, None) is not None:
            fields[name] = shrink(type(getattr(default, name)), {}).to_dict()
    layers = vars(default).get("layer_types")
    if layers and "layer_types" not in special:
        kinds = list(dict.fromkeys(layers))  # at least one layer of each kind
        fields["layer_types"] = (kinds * 4)[: max(4, len(kinds))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return cls(**{name: value for name, value in {**fields, **special}.items() if value is not ABSENT})


def build(architecture: str, config: Any) -> Any:
    """The model in fp32, with random weights that are much larger than those of a fresh model."""
    import transformers

    make = getattr(transformers, architecture)._from_config
    with torch.device("meta"):
        count = sum(p.numel() for p in make(config, attn_implementation="eager").parameters())
    if count > MAX_PARAMETERS:
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
    """Enables patch steps in the model and checks it. The verdict is that of ``hf.enable``, or ``wrong``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 6), generator=generator)
    labels = ids.clone()
    labels[0, :2] = IGNORE_INDEX
    random_ids = torch.randint(3, 64, (2, 6 * PATCH_SIZE), generator=generator)
    failure = ""
    try:
        loss, gradients = loss_and_gradients(model, ids, labels)
        random_loss = loss_of_means(model, random_ids)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    try:
        hf.enable(model, PATCH_SIZE)
    except Exception as error:
        return Row(kind, architecture, "refused", reason=f"{type(error).__name__}: {error}")
    if failure:
        return Row(kind, architecture, "not built", reason=f"its own loss or gradients fail: {failure}")
    repeated = (tensor.repeat_interleave(PATCH_SIZE, 1) for tensor in (ids, labels))
    patch_loss, patch_gradients = loss_and_gradients(model, *repeated)
    model.zero_grad()
    with torch.no_grad():
        random_patch_loss = model(input_ids=random_ids, labels=random_ids).loss.item()
    if len(patch_gradients) != len(gradients):
        reason = f"{len(patch_gradients)} gradients, {len(gradients)} of the tokens"
        return Row(kind, architecture, "wrong", reason=reason)
    size = sum(float(g.norm() ** 2) for g in gradients) ** 0.5
    distance = sum(float((a - b).norm() ** 2) for a, b in zip(patch_gradients, gradients)) ** 0.5
    errors = (abs(patch_loss / loss - 1), distance / size, abs(random_patch_loss / random_loss - 1))
    if has_auxiliary_loss(model):  # random_loss does not include it
        errors = (*errors[:2], float("nan"))
    verdict = "fused" if hf.is_fused(model) else "materialised"
    if not all(math.isnan(error) or error <= TOLERANCE for error in errors) or math.isnan(errors[0]):
        verdict = "wrong"
    return Row(kind, architecture, verdict, *errors)


@torch.no_grad()
def loss_of_means(model: Any, ids: torch.Tensor) -> float:
    """The loss of a patch step, computed from the logits that the unmodified model gives for mean embeddings."""
    means = model.get_input_embeddings()(ids).unflatten(1, (-1, PATCH_SIZE)).mean(2)
    targets = next_patch_targets(ids, PATCH_SIZE)
    return float(reference.patch_cross_entropy(model(inputs_embeds=means).logits.float(), targets))


def has_auxiliary_loss(model: Any) -> bool:
    """Whether the model adds an auxiliary loss, as mixtures of experts do."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def examine(kind: str, architecture: str) -> Row:
    """Builds the model of that type and judges it."""
    try:
        model = build(architecture, tiny(kind, architecture))
    except Exception as error:
        return Row(kind, architecture, "not built", reason=f"{type(error).__name__}: {error}")
    return judge(kind, architecture, model)


def table(rows: list[Row]) -> str:
    """The page ``docs/hf-support.md``."""
    import transformers

    counts = Counter(row.verdict for row in rows)
    exact = counts["fused"] + counts["materialised"]
    lines = [
        "# Models of Hugging Face transformers", "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, {datetime.date.today()}; made by "
        "`python bench/hf_support.py`.", "",
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
        errors = ["" if math.isnan(error) else f"{error:.0e}" for error in (row.loss, row.gradient, row.random)]
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
