"""The model that a name on the command line stands for."""

from __future__ import annotations

import dataclasses
import json

import pytest

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.model.named import named_config
from patchkernels.training.config import ModelConfig, TrainConfig

DEMO = PatchLMConfig.preset("demo")


def test_a_preset_with_changes():
    assert named_config("demo") == named_config("demo:") == DEMO
    found = named_config(
        "demo:hidden_size=64, num_hidden_layers=3,rope_theta=5e5,tie_word_embeddings=false", vocab_size=9
    )
    changes = {"hidden_size": 64, "num_hidden_layers": 3, "rope_theta": 5e5, "tie_word_embeddings": False}
    assert found == dataclasses.replace(DEMO, **changes, vocab_size=9)


def test_a_json_file(tmp_path):
    config = dataclasses.replace(DEMO, vocab_size=512, num_key_value_heads=2, head_dim=16, rope_theta=5e5)
    PatchLM(config).save_pretrained(tmp_path)
    assert named_config(str(tmp_path / "config.json")) == config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    file = tmp_path / "few.json"
    file.write_text(json.dumps({name: getattr(DEMO, name) for name in names}))
    found = named_config(str(file), vocab_size=7, max_position_embeddings=9)
    assert found == PatchLMConfig(7, *(getattr(DEMO, name) for name in names[1:]), max_position_embeddings=9)


def test_a_run_of_a_file_is_not_resumed_with_another_model_in_it(tmp_path):
    file = tmp_path / "model.json"
    identities = []
    for heads in (2, 4):
        file.write_text(json.dumps({**dataclasses.asdict(DEMO), "num_attention_heads": heads}))
        identities.append(TrainConfig(model=ModelConfig(str(file))).identity())
    assert identities[0] != identities[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo:hidden_size", "a model looks like .* got 'demo:hidden_size'"),
        ("demo:width=64", "with any of .*hidden_size"),
        ("demo:hidden_size=wide", "hidden_size must be int, got 'wide'"),
        ("demo:hidden_size=true", "hidden_size must be int, got 'true'"),
        ("demo:tie_word_embeddings=1", "tie_word_embeddings must be bool, got '1'"),
        ("demo:hidden_size=6.5", "hidden_size must be a positive integer, got 6.5"),
        ("demo:num_attention_heads=5", "num_attention_heads must divide hidden_size"),
        ("demo:max_position_embeddings=64", "max_position_embeddings is set by --context"),
        ("9b:hidden_size=64", "preset must be one of"),
        ("list.json", r"list.json is not valid JSON: expected an object, got list"),
        ("bad.json", r"bad.json is not valid JSON"),
        ("empty.json", r"empty.json lacks .'vocab_size'"),
    ],
)
def test_names_that_stand_for_no_model(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for file, text in (("list.json", "[1]"), ("bad.json", "{"), ("empty.json", "{}")):
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        named_config(name)
