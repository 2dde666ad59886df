"""The script that writes docs/hf-support.md finds what is exact, refused and wrong, and the page adds up."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from patchkernels.hf.attach import StepKind
from patchkernels.hf.modules import LogitMap

CHECKOUT = Path(__file__).parents[2]
DTYPES = ("fp32", "bf16", "fp16")
VERDICTS = ("fused", "materialised", "refused", "not built", "wrong")
PAGE = CHECKOUT / "docs" / "hf-support.md"
# Loaded by its path, since the checkout is not on sys.path: transformers would import its folder `kernels`.
spec = importlib.util.spec_from_file_location("hf_support", CHECKOUT / "bench" / "hf_support.py")
hf_support = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_support)


@pytest.mark.parametrize(
    ("kind", "architecture", "verdict"),
    [
        ("llama", "LlamaForCausalLM", "fused"),
        ("mixtral", "MixtralForCausalLM", "fused"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", "materialised"),
        ("bart", "BartForCausalLM", "refused"),
    ],
)
def test_verdicts(monkeypatch, kind, architecture, verdict):
    if kind != "llama":
        monkeypatch.setattr(hf_support, "CASES", [("zero head", "fp16")])
    row = hf_support.examine(kind, architecture)
    assert row.verdict == verdict, row
    if kind == "llama":
        assert set(row.verdicts) == {(weights, dtype) for weights in ("fresh", "zero head") for dtype in DTYPES}
    if verdict == "refused":
        assert row.errors is None and "loss_function" in row.reason
    else:
        assert 0 < row.errors.loss <= 1e-6 and 0 < row.errors.gradient <= 1e-4 and not row.reason


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(hf_support, "CASES", [("fresh", "bf16")])


def enable_anything(monkeypatch, logit_map=LogitMap()):  # noqa: B008 (it is immutable)
    """Makes ``enable`` accept every model, with the loss in its head."""
    module = importlib.import_module("patchkernels.hf.enable")  # the attribute `enable` of the package is a function
    monkeypatch.setattr(module, "find_step", lambda _: StepKind(True, logit_map))


@pytest.mark.parametrize(
    ("kind", "architecture", "settings", "reason"),
    [
        ("falcon_h1", "FalconH1ForCausalLM", {"embedding_multiplier": 3.0}, "repeated tokens, K = 2: loss off"),
        ("cohere", "CohereForCausalLM", {}, "the model changes its logits"),  # they are scaled
        ("gemma3n_text", "Gemma3nForCausalLM", {}, "gradients of"),
        ("bart", "BartForCausalLM", {}, "RuntimeError"),
    ],
)
def test_what_is_wrong_is_called_wrong(monkeypatch, one_case, kind, architecture, settings, reason):
    monkeypatch.setitem(hf_support.MISSING, kind, settings)
    assert hf_support.examine(kind, architecture).verdict == ("fused" if kind == "cohere" else "refused")
    enable_anything(monkeypatch, LogitMap(1.0, 30.0) if kind == "gemma3n_text" else LogitMap())
    row = hf_support.examine(kind, architecture)
    assert row.verdict == "wrong" and reason in row.reason, row


def test_a_model_that_sees_later_tokens_is_called_wrong(monkeypatch, one_case):
    tiny = hf_support.tiny
    monkeypatch.setattr(hf_support, "tiny", lambda *names: encoder(tiny(*names)))

    def encoder(config):
        config.is_decoder = False
        return config

    assert hf_support.examine("bert", "BertLMHeadModel").verdict == "refused"
    enable_anything(monkeypatch)
    row = hf_support.examine("bert", "BertLMHeadModel")
    assert row.verdict == "wrong" and "not causal: later tokens change logits" in row.reason, row


def test_the_page_says_what_its_rows_say():
    text = PAGE.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    counts = Counter(row[2] for row in rows if len(row) == 6)
    exact, total = counts["fused"] + counts["materialised"], sum(counts[verdict] for verdict in VERDICTS)
    assert exact >= 154 and counts["wrong"] == 0 and "mixed" not in counts
    for verdict in VERDICTS:
        assert f"{counts[verdict]} {verdict}" in text
    cases = [row[2:] for row in rows if len(row) == 7 and row[0] in ("fresh", "zero head")]
    assert len(cases) == 6
    assert all(case == [str(counts[verdict]) for verdict in VERDICTS] for case in cases)
    sentence = (
        f"Of the {total} model types of transformers 5.23, {exact} are exact ({counts['fused']} of them fused), "
        f"{counts['refused']} are refused, {counts['not built']} could not be built and none is wrong"
    )
    assert sentence in " ".join((CHECKOUT / "README.md").read_text().split())
