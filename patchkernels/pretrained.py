"""A model as an ordinary Hugging Face directory: config.json and safetensors, both ways, without transformers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from patchkernels.model import PatchLM

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
# what this model does not have: field and the only values that mean its absence
ABSENT = {"attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
          "use_sliding_window": (None, False), "rope_scaling": (None,)}  # fmt: skip


def replace_file(path: Path, write: Any) -> None:
    """``write(temporary path)``, then the rename: the file is the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(model: PatchLM, directory: str | os.PathLike[str], **token_ids: int) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of a LLaMA (a Qwen3 with QK-norm).

    ``AutoModelForCausalLM.from_pretrained`` loads the directory. ``token_ids`` (``bos_token_id``, ``eos_token_id``)
    go into the configuration.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: t.detach().contiguous() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    config = _to_hugging_face(model, token_ids)
    replace_file(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    replace_file(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def _to_hugging_face(model: PatchLM, token_ids: dict[str, int]) -> dict[str, Any]:
    config = model.config
    kind = "qwen3" if config.qk_norm else "llama"
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{field: getattr(config, field) for field in SHARED_FIELDS},
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "torch_dtype": dtype,
        "dtype": dtype,
        **({"mlp_bias": False} if kind == "llama" else {"use_sliding_window": False}),
        **token_ids,
    }


def load(directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **changes: Any) -> PatchLM:
    """The :class:`PatchLM` of a Hugging Face LLaMA or Qwen3 directory, one file or sharded.

    Args:
        dtype: of the parameters; None keeps that of the file.
        changes: settings of :class:`PatchLMConfig` to change (``attention="sdpa"``, say).

    Raises:
        FileNotFoundError: no such directory, configuration or weights.
        ValueError: another architecture, a feature this model does not have, weights that do not fit.
    """
    from patchkernels.model import PatchLM

    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    try:
        settings = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    config = dataclasses.replace(_from_hugging_face(settings, folder), **changes)
    weights = _read_weights(folder)
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight", torch.empty(0)))
    with torch.device("meta"):
        model = PatchLM(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    wrong = [n for n in expected if n not in weights or tuple(weights[n].shape) != expected[n]]
    extra = [n for n in weights if n not in expected]
    if wrong or extra:
        raise ValueError(f"{folder}: weights missing or of another shape: {wrong[:5]}, unexpected: {extra[:5]}")
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model if dtype is None else model.to(dtype)


def _from_hugging_face(settings: dict[str, Any], folder: Path) -> Any:
    from patchkernels.model import PatchLMConfig

    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder}: model_type must be one of {sorted(ARCHITECTURES)}, got {kind!r}")
    for field, values in ABSENT.items():
        if settings.get(field) not in values:
            raise ValueError(f"{folder}: {field}={settings[field]!r} is not supported by PatchLM")
    rope = settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: rope_type={rope['rope_type']!r} is not supported by PatchLM")
    missing = [field for field in SHARED_FIELDS[:5] if field not in settings]
    if missing:
        raise ValueError(f"{folder}/config.json lacks {missing}")
    return PatchLMConfig(
        **{field: settings[field] for field in SHARED_FIELDS if field in settings},
        num_key_value_heads=settings.get("num_key_value_heads"),
        head_dim=settings.get("head_dim"),
        rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
        qk_norm=kind == "qwen3",
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}")
        try:
            weights |= load_file(folder / name)
        except Exception as error:
            raise ValueError(f"{folder / name} is not a complete safetensors file: {error}") from error
    return weights
