"""A corpus as tokens: formats, held-out split, packing, cache."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchkernels.data.corpus import DataConfig, pack, prepare

TEXTS = [f"document {i}: " + " ".join(f"word{j * i % 17}" for j in range(40)) for i in range(60)]


def config(path, tmp_path, **changes) -> DataConfig:
    settings = {"vocab_size": 300, "validation_fraction": 0.1, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(path=str(path), **{**settings, **changes})


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i, text in enumerate(TEXTS):
        (root / f"{i:03d}.txt").write_text(text)
    (root / "picture.bin").write_bytes(b"\x00\xff" * 50)
    return root


def documents_of(corpus, tokens):
    edges = [*tokens.document_starts.tolist(), len(tokens)]
    return [corpus.tokenizer.decode(tokens.ids[a : b - 1].tolist()) for a, b in pairwise(edges)]


def test_every_document_is_there_once_closed_by_end_of_text(folder, tmp_path):
    corpus = prepare(config(folder, tmp_path))
    train, held_out = (documents_of(corpus, t) for t in (corpus.train, corpus.validation))
    assert sorted(train + held_out) == sorted(TEXTS)
    assert 1 <= len(held_out) < 20
    assert train != sorted(train), "shuffled"
    assert (corpus.train.ids == corpus.end_of_text).sum() == len(train)
    expected = sum(len(t.encode()) for t in held_out) / len(corpus.validation)
    assert corpus.bytes_per_token == pytest.approx(expected)
    assert corpus.train.ids.dtype == np.uint16
    assert corpus.vocab_size == 300


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "paragraphs"])
def test_formats(kind, folder, tmp_path):
    if kind == "jsonl":
        path = tmp_path / "c.jsonl"
        path.write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    elif kind == "parquet":
        datasets = pytest.importorskip("datasets")
        path = tmp_path / "c.parquet"
        datasets.Dataset.from_dict({"body": TEXTS}).to_parquet(path)
    else:
        path = tmp_path / "c.txt"
        path.write_text("\n\n".join(TEXTS))
    corpus = prepare(config(path, tmp_path, text_field="body"))
    found = documents_of(corpus, corpus.train) + documents_of(corpus, corpus.validation)
    assert sorted(found) == sorted(TEXTS)
    cached = prepare(config(path, tmp_path, text_field="body"))
    assert corpus.origin == cached.origin == path.name


def test_a_dataset_of_the_hub(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"body": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = prepare(config("someone/texts", tmp_path, text_field="body"))
    assert asked == [("someone/texts", "train")]
    assert sorted(documents_of(corpus, corpus.train) + documents_of(corpus, corpus.validation)) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"no column 'text'.*\['body'\]"):
        prepare(config("someone/texts", tmp_path))


def test_nothing_but_tokens_is_left_in_the_cache(folder, tmp_path):
    cache = prepare(config(folder, tmp_path)).tokenizer_file.parent
    names = {"meta.json", "tokenizer.json", "train.bin", "train_starts.npy", "validation.bin", "validation_starts.npy"}
    assert {path.name for path in cache.iterdir()} == names
    assert {path.name for path in cache.parent.iterdir()} == {cache.name}


def test_cache_is_keyed_by_content_and_settings(folder, tmp_path):
    first = prepare(config(folder, tmp_path))
    assert prepare(config(folder, tmp_path)).digest == first.digest
    copied = prepare(config(shutil.copytree(folder, tmp_path / "copied"), tmp_path))
    assert (copied.digest, copied.origin) == (first.digest, "copied")
    other = prepare(config(folder, tmp_path, cache_dir=str(tmp_path / "other")))
    assert other.train.ids.tobytes() == first.train.ids.tobytes()
    assert other.tokenizer_file.read_bytes() == first.tokenizer_file.read_bytes()
    assert prepare(config(folder, tmp_path), document_multiple=4).digest != first.digest
    (folder / "000.txt").write_text("changed")
    assert prepare(config(folder, tmp_path)).digest != first.digest


def test_a_given_tokenizer_is_used(folder, tmp_path):
    first = prepare(config(folder, tmp_path))
    again = prepare(config(folder, tmp_path, tokenizer=str(first.tokenizer_file.parent)))
    assert again.train.ids.tobytes() == first.train.ids.tobytes()
    assert again.digest != first.digest


@pytest.mark.parametrize("damage", ["truncated", "bad json", "missing"])
def test_a_damaged_cache_is_made_anew_with_a_warning(folder, tmp_path, caplog, damage):
    first = prepare(config(folder, tmp_path))
    content = first.train.ids.tobytes()
    file = (
        first.tokenizer_file.parent
        / {"truncated": "train.bin", "bad json": "meta.json", "missing": "tokenizer.json"}[damage]
    )
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING, "patchkernels"):
        assert prepare(config(folder, tmp_path)).train.ids.tobytes() == content
    assert "damaged" in caplog.text


def test_identical_documents_are_never_on_both_sides(folder, tmp_path):
    for i in range(60, 120):
        (folder / f"{i}.txt").write_text(TEXTS[i - 60])
    corpus = prepare(config(folder, tmp_path))
    assert not set(documents_of(corpus, corpus.train)) & set(documents_of(corpus, corpus.validation))


def test_documents_are_padded_to_a_multiple(folder, tmp_path):
    plain, padded = prepare(config(folder, tmp_path)), prepare(config(folder, tmp_path), document_multiple=4)
    for stream in ("train", "validation"):
        tokens = getattr(padded, stream)
        assert len(tokens.document_starts) == len(getattr(plain, stream).document_starts)
        assert not (tokens.document_starts % 4).any() and len(tokens) % 4 == 0
        assert len(tokens) > len(getattr(plain, stream))


@given(st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8), st.integers(1, 5))
def test_pack(documents, multiple):
    packed = list(pack(documents, 0, multiple))
    assert len(packed) == len(documents)
    for ids, row in zip(documents, packed):
        assert row[: len(ids)] == ids
        assert len(row) % multiple == 0
        assert set(row[len(ids) :]) == {0}
        assert 1 <= len(row) - len(ids) <= multiple


def test_bad_input(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder '/nowhere/x\.jsonl'"):
        prepare(config("/nowhere/x.jsonl", tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'nowhere\.txt'$"):
        prepare(config("nowhere.txt", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no UTF-8 text"):
        prepare(config(tmp_path / "empty", tmp_path))
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"no column 'text'.*\['body'\]"):
        prepare(config(tmp_path / "c.jsonl", tmp_path))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match="could not be read as json"):
        prepare(config(tmp_path / "broken.jsonl", tmp_path))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        prepare(config(tmp_path / "binary.txt", tmp_path))
    (tmp_path / "one.txt").write_text("a single paragraph")
    with pytest.raises(ValueError, match="1 documents"):
        prepare(config(tmp_path / "one.txt", tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        prepare(config(folder, tmp_path, tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        prepare(config(folder, tmp_path, tokenizer="/nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prepare(config(folder, tmp_path, cache_dir=str(tmp_path / "file" / "cache")))
    for bad in ({"vocab_size": 100}, {"validation_fraction": 0.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(bad))} must be"):
            prepare(config(folder, tmp_path, **bad))
    with pytest.raises(ValueError, match="document_multiple must be at least 1, got 0"):
        prepare(config(folder, tmp_path), document_multiple=0)
