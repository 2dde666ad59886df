"""The script that writes docs/hf-support.md finds what is exact, refused and wrong, and the page adds up."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")
CHECKOUT = Path(__file__).parents[2]
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
        ("gpt2", "GPT2LMHeadModel", "fused"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", "materialised"),
        ("bart", "BartForCausalLM", "refused"),
    ],
)
def test_verdicts(kind, architecture, verdict):
    row = hf_support.examine(kind, architecture)
    assert row.verdict == verdict, row
    assert (row.loss <= hf_support.TOLERANCE and row.gradient <= hf_support.TOLERANCE) == (verdict != "refused")
    assert bool(row.reason) == (verdict == "refused")


def test_what_is_wrong_is_called_wrong(monkeypatch):
    monkeypatch.setitem(hf_support.SPECIAL, "falcon_h1", {"embedding_multiplier": 3.0})
    assert hf_support.examine("falcon_h1", "FalconH1ForCausalLM").verdict == "refused"
    module = importlib.import_module("patchkernels.hf.enable")  # the attribute `enable` of the package is a function
    monkeypatch.setattr(module, "inexactness", lambda *_: "")
    row = hf_support.examine("falcon_h1", "FalconH1ForCausalLM")
    assert row.verdict == "wrong" and row.loss > hf_support.TOLERANCE
    assert hf_support.examine("llama", "LlamaForCausalLM").verdict == "fused"


def test_the_page_says_what_its_rows_say():
    text = PAGE.read_text()
    counts = Counter(line.split("|")[3].strip() for line in text.splitlines() if line.startswith("|"))
    for verdict in ("fused", "materialised", "refused"):
        assert f"{counts[verdict]} {verdict}" in text
    assert f"{counts['fused'] + counts['materialised']} exact" in text
    exact = counts["fused"] + counts["materialised"]
    total = sum(counts[verdict] for verdict in VERDICTS)
    sentence = (
        f"Of the {total} model types of transformers 5.23, built at a tiny size, "
        f"{exact} are exact ({counts['fused']} of them fused), {counts['refused']} are refused, "
        f"{counts['not built']} could not be built and none is wrong"
    )
    assert sentence in " ".join((CHECKOUT / "README.md").read_text().split())
    assert counts["wrong"] == 0 and "0 wrong" in text
    assert counts["fused"] + counts["materialised"] >= 105
