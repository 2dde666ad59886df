"""transformers reads the folders that we write, and we read those that transformers writes."""

from __future__ import annotations

import json

import pytest
import torch

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.model.hugging_face import EMBEDDING_WEIGHT, HEAD_WEIGHT, read_folder

transformers = pytest.importorskip("transformers")

SETTINGS = {
    "llama": {},
    "llama grouped tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 2, "head_dim": 12},
}


def model_of(name: str) -> PatchLM:
    config = PatchLMConfig(67, 32, 48, 2, 4, max_position_embeddings=64, rope_theta=5e4, **SETTINGS[name])
    return PatchLM(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_equal_both_ways(name, tmp_path):
    ids = torch.randint(0, 67, (2, 20))
    model = model_of(name)
    model.save_pretrained(tmp_path / "saved", eos_token_id=3)
    hf_model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(hf_model).__name__ == ("Qwen3ForCausalLM" if name == "qwen3" else "LlamaForCausalLM")
    assert hf_model.config.eos_token_id == 3
    torch.testing.assert_close(hf_model(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    torch.nn.init.normal_(hf_model.model.layers[0].mlp.up_proj.weight)
    hf_model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = PatchLM.from_pretrained(tmp_path / "sharded")
    torch.testing.assert_close(hf_model(ids).logits, loaded(ids), rtol=1e-5, atol=1e-5)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == ("tied" in name)


def test_dtype_and_round_trip(tmp_path):
    model = model_of("llama").bfloat16()
    model.save_pretrained(tmp_path)
    loaded = PatchLM.from_pretrained(tmp_path, attention="sdpa")
    assert loaded.config.attention == "sdpa"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert PatchLM.from_pretrained(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    loaded(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_stored_unless_it_is_tied(tmp_path, tied):
    model_of("llama grouped tied" if tied else "llama").save_pretrained(tmp_path)
    config, weights = read_folder(tmp_path)
    assert config.tie_word_embeddings is tied
    assert (HEAD_WEIGHT in weights) is not tied
    assert EMBEDDING_WEIGHT in weights


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(weights, path, metadata):
        path.write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr("patchkernels.model.hugging_face.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"hidden_size": 64}, "another shape"),
        ({"num_hidden_layers": 1}, "unexpected"),
    ],
)
def test_unsupported_or_ill_fitting_folders(tmp_path, change, message):
    model_of("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        PatchLM.from_pretrained(tmp_path)


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        PatchLM.from_pretrained(tmp_path)
    model_of("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete"):
        PatchLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        PatchLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        PatchLM.from_pretrained(tmp_path)
