"""A corpus in one Parquet file."""

from __future__ import annotations

import json

import pytest
from source_tree import ENDINGS, data_settings, documents, sides, write_tree

from patchkernels.data.corpus import prepare
from patchkernels.data.parquet import CorpusConfig, pack_corpus, print_corpus
from patchkernels.data.sources import find_source


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def test_packed_and_read_back_it_is_the_same_corpus(tree, tmp_path):
    out = tmp_path / "kernel.parquet"
    packed = pack_corpus(CorpusConfig(str(out), str(tree), endings=ENDINGS, origin="linux 6.1"))
    expected = documents(tree, ENDINGS)
    assert documents(out) == expected
    assert (packed.documents, packed.text_bytes) == (len(expected), sum(len(d.text.encode()) for d in expected))
    assert set(packed.endings) == set(ENDINGS)
    assert packed.file_bytes == out.stat().st_size < packed.text_bytes
    assert find_source(str(out), "text").origin == "linux 6.1"
    assert sides(out, tmp_path) == sides(tree, tmp_path, endings=ENDINGS), "split by file name there too"
    assert prepare(data_settings(out, tmp_path)).origin == "linux 6.1"
    assert not list(tmp_path.glob(".kernel*")), "nothing temporary is left"


def test_a_slice_is_as_large_as_asked_and_always_the_same(tree, tmp_path):
    whole = sum(len(d.text.encode()) for d in documents(tree, ENDINGS))
    out = tmp_path / "slice.parquet"
    config = CorpusConfig(str(out), str(tree), endings=ENDINGS, megabytes=whole / 3e6)
    packed = pack_corpus(config)
    assert whole / 3 - 2000 < packed.text_bytes <= whole / 3
    assert packed.origin == f"tree, {packed.text_bytes / 1e6:.1f} of {whole / 1e6:.1f} MB"
    first = documents(out)
    pack_corpus(config)
    assert documents(out) == first
    assert {d.path.split("/")[0] for d in first} >= {"arch", "drivers"}, "from all over the tree"


@pytest.mark.parametrize("kind", ["jsonl", "paragraphs", "standard library"])
def test_any_source_can_be_packed(kind, tmp_path):
    texts = [f"text number {i}" for i in range(5)]
    path = None
    if kind == "jsonl":
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    elif kind == "paragraphs":
        path = tmp_path / "t.txt"
        path.write_text("\n\n".join(texts))
    out = tmp_path / "out.parquet"
    pack_corpus(CorpusConfig(str(out), path and str(path), text_field="body", megabytes=0.5 if path is None else None))
    found = documents(out)
    if path is None:
        assert sum(len(d.text.encode()) for d in found) <= 5e5
        assert find_source(str(out), "text").origin.startswith("the standard library of Python 3.")
    else:
        assert [d.text for d in found] == texts


def test_a_failure_leaves_the_old_file(tree, tmp_path):
    out = tmp_path / "c.parquet"
    pack_corpus(CorpusConfig(str(out), str(tree), endings=ENDINGS))
    before = out.read_bytes()
    for bad, words in (
        ({"endings": (".rs",)}, "no file ends with"),
        ({"megabytes": 1e-6}, "as small as 1e-06 MB"),
        ({"path": "/nowhere"}, "no file or folder '/nowhere'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            pack_corpus(CorpusConfig(**{"out": str(out), "path": str(tree), "endings": ENDINGS, **bad}))
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".c.parquet*"))
    with pytest.raises(ValueError, match=r"out must end in \.parquet, got 'c\.txt'"):
        CorpusConfig("c.txt")
    with pytest.raises(ValueError, match="megabytes must be positive, got 0"):
        CorpusConfig("c.parquet", megabytes=0)


def test_the_command_prints_what_the_file_holds(tree, tmp_path, capsys):
    out = tmp_path / "c.parquet"
    print_corpus(CorpusConfig(str(out), str(tree), endings=(".h",), origin="linux 6.1"))
    text = sum(len(d.text.encode()) for d in documents(tree, (".h",)))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{out}: linux 6.1"
    assert second.startswith("40 documents, 0.0 MB of text in 0.0 MB; ")
    assert second.endswith(f'bytes by ending: {{".h": {text}}}')
