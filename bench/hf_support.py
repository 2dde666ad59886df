"""Tests which causal language models of the installed transformers can take patch steps, each at a tiny size.

    python bench/hf_support.py                        writes docs/hf-support.md; about half an hour on one core
    python bench/hf_support.py --out "" llama gemma2  only prints what it finds, for some model types

Run it as a script, with patchkernels installed, so that the checkout is not on ``sys.path``: transformers imports any
module named ``kernels``, and the checkout has a folder of that name.

Every model type is enabled as users have it: with the weights that transformers gives a new model, and with a head of
zeros, in fp32, bf16 and fp16. A model that could be enabled is then judged without the code that enabled it: a copy of
the enabled model is turned to fp32, gets large random weights, and is compared with an unmodified model of these
weights. The exit code is 1 if one that could be enabled fails.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import logging
import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from patchkernels import hf, next_patch_targets, reference
from patchkernels.hf.small_config import small_config
from patchkernels.numerics import IGNORE_INDEX

CHECKOUT = Path(__file__).resolve().parents[1]
PATCH_SIZES = (2, 3)
PATCHES = 6
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative, in fp32
# A gradient is compared relative to its norm, but not to less than this share of the norm of all gradients: some are
# zero but for rounding errors.
GRADIENT_FLOOR = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = ("fresh", "zero head")
CASES = [(weights, dtype) for weights in WEIGHTS for dtype in DTYPES]
VERDICTS = ("fused", "materialised", "refused", "not built", "wrong")
MAX_PARAMETERS = 20_000_000
ORDINARY_TOKENS = (3, 40)  # special tokens of a tiny configuration are below or above

# Settings that the default configuration of a model type lacks, so that no model can be built from it or run.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20]}
INDEXER = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip
MISSING: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 20,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), SECTIONS),
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}

HOW_IT_IS_JUDGED = (
    "A model that could be enabled is judged without the code that enabled it. Two copies, of the enabled and of the "
    "unmodified model, are turned to fp32 and get the same random weights, much larger than those of a new model. In "
    f"patches of {' and '.join(map(str, PATCH_SIZES))}, tokens that are each repeated must give the loss and the "
    "gradients of the tokens, and random tokens those of the definition, from mean embeddings and the unmodified "
    "model's logits. The same parameters must have a gradient, every gradient must agree, and later tokens must not "
    "change earlier rows. A type is *wrong* if one of its six could be enabled and fails.",
    "",
    "*loss* and *gradient* are the largest relative errors: a gradient's is relative to its norm, or to "
    f"{GRADIENT_FLOOR:.0e} of the norm of all gradients if that is larger. What counts for a model of other settings "
    "is what `enable` says of it.",
)


@dataclass
class Errors:
    """Relative errors of an enabled model; NaN before it is judged."""

    loss: float = 0.0
    gradient: float = 0.0

    def update(self, loss: float, gradient: float) -> None:
        self.loss, self.gradient = max(self.loss, loss), max(self.gradient, gradient)


@dataclass
class Row:
    """The result for one model type: a row of the table on the page."""

    kind: str
    architecture: str
    verdicts: dict[tuple[str, str], str] = field(default_factory=dict)  # for every one of CASES
    errors: Errors | None = None  # the largest of all that could be enabled
    reason: str = ""

    @property
    def verdict(self) -> str:
        """``fused``, ``materialised``, ``refused``, ``not built`` or ``wrong``; ``mixed`` if it depends on the case."""
        found = set(self.verdicts.values())
        return "wrong" if "wrong" in found else found.pop() if len(found) == 1 else "mixed"


class WrongError(Exception):
    """What is wrong with a model that could be enabled."""


def tiny(kind: str, architecture: str) -> Any:
    """The configuration of the architecture at a tiny size."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # A model type may have a configuration for several kinds of input, and its causal model one for text alone.
    config_class = getattr(transformers, architecture).config_class or CONFIG_MAPPING[kind]
    config = small_config(config_class(**MISSING.get(kind, {})))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    config.get_text_config().use_cache = False
    return config


def build(architecture: str, config: Any, weights: str, dtype: str) -> Any:
    """A new model, as transformers builds it."""
    import transformers

    make = getattr(transformers, architecture)._from_config
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in make(copy.deepcopy(config)).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count:,} parameters: the tiny configuration is not tiny")
    torch.manual_seed(0)
    model = make(copy.deepcopy(config), dtype=DTYPES[dtype]).eval()
    if weights == "zero head":
        with torch.no_grad():
            for parameter in model.get_output_embeddings().parameters():
                parameter.zero_()
    return model


def examine(kind: str, architecture: str) -> Row:
    """Builds models of that type, enables them and judges those that could be enabled."""
    row = Row(kind, architecture)
    for weights, dtype in CASES:
        try:
            model = build(architecture, tiny(kind, architecture), weights, dtype)
        except Exception as error:
            row.verdicts[weights, dtype], row.reason = "not built", describe(error)
            continue
        plain = copy.deepcopy(model)
        try:
            hf.enable(model)
        except Exception as error:
            row.verdicts[weights, dtype], row.reason = "refused", describe(error)
            continue
        row.verdicts[weights, dtype] = "fused" if hf.is_fused(model) else "materialised"
        row.errors = row.errors or Errors()
        try:
            judge(copy.deepcopy(model), plain, row.errors)
        except Exception as error:
            row.verdicts[weights, dtype], row.reason = "wrong", describe(error)
    return row


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, WrongError) else f"{type(error).__name__}: {error}"


def judge(enabled: Any, plain: Any, errors: Errors) -> None:
    """Compares an enabled model with an unmodified one, both in fp32 and with the same large random weights.

    Raises:
        WrongError: losses or gradients differ, or a later token changes an earlier row of logits or loss.
    """
    give_large_weights(enabled, plain)
    generator = torch.Generator().manual_seed(1)
    check_causality(enabled, plain, generator)
    for patch_size in PATCH_SIZES:
        ids = torch.randint(*ORDINARY_TOKENS, (2, PATCHES), generator=generator)
        labels = ids.clone()
        labels[0, :2] = IGNORE_INDEX
        expected = loss_and_gradients(plain, input_ids=ids, labels=labels)
        enabled.patch_size = patch_size
        repeated = (tensor.repeat_interleave(patch_size, 1) for tensor in (ids, labels))
        found = loss_and_gradients(enabled, **dict(zip(("input_ids", "labels"), repeated)))
        compare(found, expected, errors, f"repeated tokens, K = {patch_size}")
        ids = torch.randint(*ORDINARY_TOKENS, (2, PATCHES * patch_size), generator=generator)
        found = loss_and_gradients(enabled, input_ids=ids, labels=ids)
        compare(found, step_by_definition(plain, ids, patch_size), errors, f"random tokens, K = {patch_size}")


def give_large_weights(enabled: Any, plain: Any) -> None:
    """Turns both models to fp32 and gives them the same random weights, much larger than those of a new model."""
    enabled.float(), plain.float()
    generator = torch.Generator().manual_seed(0)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in enabled.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.1)
            weights.pop(name).copy_(parameter)
    if weights:
        raise WrongError(f"the enabled model lacks parameters: {sorted(weights)}")


def loss_and_gradients(model: Any, **batch: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def step_by_definition(model: Any, ids: torch.Tensor, patch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a patch step of an unmodified model, from mean embeddings and the definition of the loss.

    The loss takes the place of the model's own, so that the model adds to it what it adds to its own.
    """
    means = model.get_input_embeddings()(ids).unflatten(1, (-1, patch_size)).mean(2)
    targets = next_patch_targets(ids, patch_size)
    loss_function = model.loss_function
    model.loss_function = lambda logits, *_, **__: reference.patch_cross_entropy(logits.float(), targets)
    try:
        return loss_and_gradients(model, inputs_embeds=means, labels=targets[..., 0])
    finally:
        model.loss_function = loss_function


def compare(found: Any, expected: Any, errors: Errors, what: str) -> None:
    """Notes the errors of loss and gradients; raises WrongError if they are too large or gradients are missing."""
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    if gradients.keys() != expected_gradients.keys():
        raise WrongError(f"{what}: gradients of {sorted(gradients.keys() ^ expected_gradients.keys())[:3]}")
    total = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected_gradients.values()))
    worst, name = max(
        (float((gradients[name] - g).norm()) / max(float(g.norm()), GRADIENT_FLOOR * total), name)
        for name, g in expected_gradients.items()
    )
    errors.update(loss_error := abs(loss / expected_loss - 1), worst)
    if not (loss_error <= LOSS_TOLERANCE and worst <= GRADIENT_TOLERANCE):
        raise WrongError(f"{what}: loss off by {loss_error:.0e}, the gradient of {name} by {worst:.0e}")


@torch.no_grad()
def check_causality(enabled: Any, plain: Any, generator: torch.Generator) -> None:
    """Raises WrongError if a later token changes an earlier row: of logits, or of the losses of a patch step."""
    patch_size, changed = PATCH_SIZES[-1], 3  # the last patches, whose tokens change
    ids = torch.randint(*ORDINARY_TOKENS, (2, PATCHES * patch_size), generator=generator)
    other = ids.clone()
    other[:, -changed * patch_size :] = torch.randint(*ORDINARY_TOKENS, (2, changed * patch_size), generator=generator)
    logits = [plain(input_ids=tokens).logits[:, : -changed * patch_size] for tokens in (ids, other)]
    enabled.patch_size, losses = patch_size, []
    for tokens in (ids, other):
        enabled(input_ids=tokens, labels=tokens)
        losses.append(enabled._patch_state.last_step.losses[:, : -changed - 1])  # the next row has changed targets
    for what, (a, b) in (("logits", logits), ("losses of a patch step", losses)):
        if not (a - b).abs().max() <= LOSS_TOLERANCE * a.abs().max():
            raise WrongError(f"not causal: later tokens change {what}")


def table(rows: list[Row]) -> str:
    """The page ``docs/hf-support.md``."""
    import transformers

    counts = Counter(row.verdict for row in rows)
    lines = [
        "# Models of Hugging Face transformers", "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, {datetime.date.today()}; made by "
        "`python bench/hf_support.py`.", "",
        f"Of {len(rows)} model types with a causal language model: {counts['fused'] + counts['materialised']} exact "
        f"({counts['fused']} fused, {counts['materialised']} materialised), {counts['refused']} refused, "
        f"{counts['not built']} not built, {counts['mixed']} mixed, {counts['wrong']} wrong.", "",
        "Each is built at a tiny size from its default configuration and enabled six times: with the weights that "
        "transformers gives a new model and with a head of zeros, in three dtypes. *mixed*: not the same in all six.",
        "", f"| weights | dtype | {' | '.join(VERDICTS)} |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for case in CASES:
        found = Counter(row.verdicts[case] for row in rows)
        lines.append(f"| {' | '.join((*case, *(str(found[verdict]) for verdict in VERDICTS)))} |")
    lines += ["", *HOW_IT_IS_JUDGED, ""]
    lines += ["| model type | class | | loss | gradient | reason |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        errors = (f"{row.errors.loss:.0e}", f"{row.errors.gradient:.0e}") if row.errors else ("", "")
        verdict = row.verdict
        if verdict == "mixed":
            verdict = "; ".join(f"{' '.join(case)}: {found}" for case, found in row.verdicts.items())
        reason = " ".join(row.reason.split()).replace("|", "\\|")
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        lines.append(f"| {row.kind} | {row.architecture} | {verdict} | {' | '.join(errors)} | {reason} |")
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
            print(f"{len(rows):>4} {kind} {rows[-1].verdict} {rows[-1]}", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(table(rows))
    print(Counter(row.verdict for row in rows))
    return int(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
