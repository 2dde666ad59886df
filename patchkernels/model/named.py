"""The model that a name on the command line stands for: a preset, a preset with changes, or a JSON file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from patchkernels.model.config import PatchLMConfig
from patchkernels.model.hugging_face import read_config

# Settings of a model that have an option of their own, or follow from the schedule.
BY_OPTION = {
    "max_position_embeddings": "--context", "attention": "--attention", "qk_norm": "--qk-norm",
    "activation_checkpointing": "--activation-checkpointing",
}  # fmt: skip


def named_config(name: str, **changes: Any) -> PatchLMConfig:
    """The settings that ``name`` stands for, with ``changes``.

    Args:
        name: a preset (``"demo"``), a preset with changes (``"demo:hidden_size=64,num_hidden_layers=3"``), or a JSON
            file of settings with the names of :class:`PatchLMConfig`, such as a ``config.json`` of a LLaMA.
        **changes: settings that come from elsewhere, such as the size of the vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown preset or setting, a value of another type, or settings that do not fit together.
    """
    if name.endswith(".json"):
        return dataclasses.replace(read_config(Path(name)), **changes)
    preset, _, text = name.partition(":")
    named = dict(_change(part, name) for part in text.split(",")) if text else {}
    return PatchLMConfig.preset(preset, **named | changes)


def _change(part: str, name: str) -> tuple[str, Any]:
    """The setting and its value that ``hidden_size=64`` stands for."""
    field, equals, text = (word.strip() for word in part.partition("="))
    settings = {setting.name: setting for setting in dataclasses.fields(PatchLMConfig)}
    if not equals or field not in settings:
        raise ValueError(f"a model looks like 'demo:hidden_size=64', with any of {sorted(settings)}; got {name!r}")
    if field in BY_OPTION:
        raise ValueError(f"{field} is set by {BY_OPTION[field]}, not in the model's name; got {name!r}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    of_type = isinstance(value, bool) if settings[field].type == "bool" else isinstance(value, int | float)
    if not of_type or (isinstance(value, bool) and settings[field].type != "bool"):
        raise ValueError(f"{field} must be {settings[field].type}, got {text!r} in {name!r}")
    return field, value
