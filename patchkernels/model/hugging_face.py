"""Writes and reads a model as a Hugging Face folder (config.json and safetensors) without transformers.

A folder holds a LLaMA, or a Qwen3 if queries and keys are normalised. Its weights have the names of
``PatchLM.state_dict()``, which are those of ``LlamaForCausalLM`` and ``Qwen3ForCausalLM``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from patchkernels.files import replace_file
from patchkernels.model.config import PatchLMConfig

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"  # not stored if it is tied to the embedding
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REQUIRED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
SHARED_FIELDS = (
    *REQUIRED_FIELDS, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
# Features that PatchLM lacks: the settings that turn them on, each with the only values that leave them off.
UNSUPPORTED_FIELDS = {
    "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
    "use_sliding_window": (None, False), "rope_scaling": (None,),
}  # fmt: skip


def write_folder(
    directory: str | os.PathLike[str],
    config: PatchLMConfig,
    weights: Mapping[str, Tensor],
    token_ids: Mapping[str, int],
) -> None:
    """Writes ``config.json`` and ``model.safetensors``, each of them whole or not at all.

    Args:
        weights: all of ``PatchLM.state_dict()``. A head that is tied to the embedding is left out of the file.
        token_ids: ``bos_token_id``, ``eos_token_id`` and the like, for the configuration.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _to_hugging_face(config, weights[HEAD_WEIGHT], token_ids)
    stored = {
        name: tensor.detach().contiguous()
        for name, tensor in weights.items()
        if not (config.tie_word_embeddings and name == HEAD_WEIGHT)
    }
    replace_file(folder / "model.safetensors", lambda path: save_file(stored, path, metadata={"format": "pt"}))
    replace_file(folder / "config.json", lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))


def read_folder(directory: str | os.PathLike[str]) -> tuple[PatchLMConfig, dict[str, Tensor]]:
    """The settings and the weights of a folder. The weights may be in one file or in several.

    The weights are returned as stored: they are not checked against the settings, and a tied head is not among them.

    Raises:
        FileNotFoundError: no such folder, configuration or weights.
        ValueError: another architecture, a feature that PatchLM does not have, a damaged file.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    return read_config(folder / "config.json"), _read_weights(folder)


def read_config(file: Path) -> PatchLMConfig:
    """The settings of a model in a JSON file. They are those of a LLaMA unless ``model_type`` says otherwise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another architecture, a feature that PatchLM does not have, or no JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        settings = json.loads(file.read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object, got {type(settings).__name__}")
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    return _from_hugging_face({"model_type": "llama", **settings}, file)


def _to_hugging_face(config: PatchLMConfig, head: Tensor, token_ids: Mapping[str, int]) -> dict[str, Any]:
    model_type = "qwen3" if config.qk_norm else "llama"
    dtype = str(head.dtype).removeprefix("torch.")
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{field: getattr(config, field) for field in SHARED_FIELDS},
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
        **({"mlp_bias": False} if model_type == "llama" else {"use_sliding_window": False}),
        **token_ids,
    }


def _from_hugging_face(settings: dict[str, Any], file: Path) -> PatchLMConfig:
    model_type = settings.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type must be one of {sorted(ARCHITECTURES)}, got {model_type!r}")
    for field, values in UNSUPPORTED_FIELDS.items():
        if settings.get(field) not in values:
            raise ValueError(f"{file}: {field}={settings[field]!r} is not supported by PatchLM")
    rope = settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{file}: rope_type={rope['rope_type']!r} is not supported by PatchLM")
    missing = [field for field in REQUIRED_FIELDS if field not in settings]
    if missing:
        raise ValueError(f"{file} lacks {missing}")
    return PatchLMConfig(
        **{field: settings[field] for field in SHARED_FIELDS if field in settings},
        num_key_value_heads=settings.get("num_key_value_heads"),
        head_dim=settings.get("head_dim"),
        rope_theta=rope.get("rope_theta", settings.get("rope_theta", PatchLMConfig.rope_theta)),
        qk_norm=model_type == "qwen3",
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
