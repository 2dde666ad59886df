"""Where text comes from, how it is split, and the corpus in one file."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from patchkernels.corpus import CorpusConfig, pack_corpus
from patchkernels.data import DataConfig, prepare
from patchkernels.sources import COPIES, Source, split_keys

ROOT = Path(__file__).parents[1]
ENDINGS = (".c", ".h")


@pytest.fixture
def tree(tmp_path):
    """Some kernel: sources, a directory that was copied and edited, Makefiles, a duplicate, and what is no text."""
    root = tmp_path / "tree"
    for i in range(40):
        (root / f"drivers/d{i}").mkdir(parents=True)
        (root / f"drivers/d{i}/unit{i}.c").write_text(f"int unit{i}(void) {{ return {i}; }}\n" * (i + 5))
        (root / f"drivers/d{i}/Makefile").write_text(f"obj-y += unit{i}.o\n")
    for name, edit in (("arch/a/include", ""), ("arch/b/include", "/* edited */\n")):
        (root / name).mkdir(parents=True)
        for i in range(20):
            (root / name / f"header{i}.h").write_text(f"{edit}#define HEADER_{i} {i}\n" * 8)
    (root / "copy.c").write_text((root / "drivers/d7/unit7.c").read_text())
    (root / "blank.c").write_text(" \n")
    (root / "image.c").write_bytes(b"\x00\xff")
    (root / "link.c").symlink_to(root / "drivers/d3/unit3.c")
    return root


def data(path, tmp_path, **changes) -> DataConfig:
    settings = {"vocab_size": 300, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(path=str(path), **{**settings, **changes})


def documents(path, endings=(), arrow=None):
    source = Source(str(path), "text", endings)
    source.load(arrow or Path(path).parent / "arrow")
    return list(source.documents())


def sides(path, tmp_path, **changes):
    corpus = prepare(data(path, tmp_path, **changes))
    found = []
    for tokens in (corpus.train, corpus.validation):
        text = corpus.tokenizer.decode(tokens.ids.tolist(), skip_special_tokens=False)
        found.append({part for part in text.split("<|endoftext|>") if part})
    return found


# Documents


def test_endings_text_and_content_choose_the_documents(tree):
    found = documents(tree, ENDINGS)
    paths = {document.path for document in found}
    expected = {f"drivers/d{i}/unit{i}.c" for i in range(40)} | {
        f"arch/{a}/include/header{i}.h" for a in "ab" for i in range(20)
    }
    # copy.c comes before drivers/ and stands for its content
    assert paths == expected - {"drivers/d7/unit7.c"} | {"copy.c"}
    assert len({document.text for document in found}) == len(found)
    with pytest.raises(ValueError, match=r"no file ends with any of \.rs, \.go"):
        Source(str(tree), "text", (".rs", ".go"))


def test_a_copied_directory_is_never_on_both_sides(tree, tmp_path):
    train, held_out = sides(tree, tmp_path, endings=ENDINGS)
    assert train and held_out and not train & held_out
    for i in range(20):
        original, edited = ((tree / f"arch/{a}/include/header{i}.h").read_text() for a in "ab")
        assert (original in train) == (edited in train)
        assert (original in held_out) == (edited in held_out)


names = st.sampled_from(["a.c", "b.c", "c.h", "Makefile"])
paths = st.one_of(st.none(), st.tuples(st.sampled_from(["x", "y", "x/y", "z/y"]), names).map("/".join))


@given(st.lists(paths, max_size=60))
@example([f"{place}/Makefile" for place in ("x", "y", "x/y")] * 8 + ["x/a.c", "y/a.c"] * 10)
def test_split_keys(found):
    digests = [index.to_bytes(8, "big") for index in range(len(found))]
    keys = split_keys(found, digests)
    assert len(keys) == len(found)
    if keys == digests:  # all of one name, or none has a path
        return
    common = max(COPIES, len(found) // 100)
    count = {
        name: sum(p is not None and Path(p).name == name for p in found) for name in {Path(p).name for p in found if p}
    }
    for (p, k), (q, other) in ((a, b) for a in zip(found, keys) for b in zip(found, keys)):
        if p is None or q is None:
            assert (k == other) == (p is None and q is None and k is other)
        elif Path(p).name == Path(q).name and count[Path(p).name] <= common:
            assert k == other
        elif Path(p).name != Path(q).name:
            assert k != other
        else:
            assert (k == other) == (Path(p).parent.name == Path(q).parent.name)


def test_versions_of_a_small_tree_are_on_one_side(tmp_path):
    for version, i in itertools.product(range(3), range(30)):
        file = tmp_path / "tree" / f"v{version}" / f"{i}.c"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"file {i} " * 20 + f"of version {version}")
    train, held_out = sides(tmp_path / "tree", tmp_path)
    number = re.compile(r"file (\d+)")
    assert held_out and {number.search(t)[1] for t in train}.isdisjoint(number.search(t)[1] for t in held_out)


def test_files_that_all_have_one_name_are_split_by_content(tmp_path):
    root = tmp_path / "books"
    for i in range(40):
        (root / str(i)).mkdir(parents=True)
        (root / str(i) / "text.txt").write_text(f"book {i} " * 20)
    train, held_out = sides(root, tmp_path)
    assert len(train) + len(held_out) == 40 and 2 < len(held_out) < 20


# One file


def test_packed_and_read_back_it_is_the_same_corpus(tree, tmp_path):
    out = tmp_path / "kernel.parquet"
    said = pack_corpus(CorpusConfig(str(out), str(tree), endings=ENDINGS, origin="linux 6.1"))
    there = documents(tree, ENDINGS)
    assert documents(out) == there
    assert (said["documents"], said["bytes"]) == (len(there), sum(len(d.text.encode()) for d in there))
    assert set(said["endings"]) == set(ENDINGS)
    assert said["compressed"] == out.stat().st_size < said["bytes"]
    assert Source(str(out), "text").origin == "linux 6.1"
    assert sides(out, tmp_path) == sides(tree, tmp_path, endings=ENDINGS), "split by file name there too"
    assert prepare(data(out, tmp_path)).origin == "linux 6.1"
    assert not list(tmp_path.glob(".kernel*")), "nothing temporary is left"


def test_a_slice_is_as_large_as_asked_and_always_the_same(tree, tmp_path):
    whole = sum(len(d.text.encode()) for d in documents(tree, ENDINGS))
    out = tmp_path / "slice.parquet"
    config = CorpusConfig(str(out), str(tree), endings=ENDINGS, megabytes=whole / 3e6)
    said = pack_corpus(config)
    assert whole / 3 - 2000 < said["bytes"] <= whole / 3
    assert said["origin"] == f"tree, {said['bytes'] / 1e6:.1f} of {whole / 1e6:.1f} MB"
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
        assert Source(str(out), "text").origin.startswith("the standard library of Python 3.")
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


# The scripts


def command(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / name), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_linux_corpus(tree, tmp_path):
    """With stand-ins for Debian's commands, which the package would come from."""
    work = tmp_path / "bin"
    work.mkdir()
    package = tmp_path / "pkg/usr/src"
    package.mkdir(parents=True)
    subprocess.run(["tar", "-cJf", package / "linux-source-6.1.tar.xz", "-C", tmp_path, "tree"], check=True)
    subprocess.run(["tar", "-cf", tmp_path / "fs.tar", "-C", tmp_path / "pkg", "./usr"], check=True)
    stands_in = {
        "apt-cache": 'printf "linux-source\\n  Depends: linux-source-6.1\\n"',
        "apt-get": '[ "$1 $2" = "download linux-source-6.1" ] && touch linux-source-6.1_6.1.9-1_all.deb',
        "dpkg-deb": f"case $1 in --field) echo 6.1.9-1;; --fsys-tarfile) cat {tmp_path}/fs.tar;; esac",
        "patchkernels": f'PYTHONPATH={ROOT} exec {sys.executable} -m patchkernels "$@"',
    }
    for name, body in stands_in.items():
        file = work / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "linux.parquet"
    done = command("linux_corpus.sh", str(out), PATH=f"{work}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert Source(str(out), "text").origin == "linux-source-6.1 6.1.9-1"
    assert [d.path for d in documents(out)] == [d.path for d in documents(tree, ENDINGS)]
    missing = command("linux_corpus.sh")
    assert missing.returncode != 0 and "usage" in missing.stderr


def test_experiment_gpu_on_a_cpu(tree, tmp_path):
    """The script that is meant for a machine with a GPU and without network, with a budget that a CPU can pay."""
    corpus = tmp_path / "kernel.parquet"
    pack_corpus(CorpusConfig(str(corpus), str(tree), endings=ENDINGS))
    folder = tmp_path / "out"
    options = ["--tokens", "1536", "--context", "16", "--batch-size", "2", "--model", "demo", "--device", "cpu",
               "--compile", "False", "--data.vocab-size", "300", "--no-tune", "--seeds", "1"]  # fmt: skip
    out_of_time = command(
        "experiment_gpu.sh", str(corpus), str(folder), *options, PYTHON=sys.executable, MINUTES="0.01"
    )
    assert out_of_time.returncode == 75, out_of_time.stderr
    done = command("experiment_gpu.sh", str(corpus), str(folder), *options, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    for name in ("42m", "124m"):
        report = (folder / name / "report.md").read_text()
        assert "ρ of B" in report and "unfinished" not in report
        assert {path.name for path in (folder / name).glob("*.*")} >= {"report.md", "results.jsonl", "loss.png"}
    missing = command("experiment_gpu.sh", str(corpus))
    assert missing.returncode != 0 and "usage" in missing.stderr


# What a folder holds


def test_a_json_file_among_texts_is_one_of_them(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "a.txt").write_text("a text")
    (root / "package.json").write_text('{"name": "x"}')
    assert [d.path for d in documents(root)] == ["a.txt", "package.json"]


def test_rows_are_read_whatever_lies_beside_them(tmp_path):
    root = tmp_path / "dump"
    root.mkdir()
    (root / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (root / "README.md").write_text("about the rows")
    (root / "info.json").write_text('{"rows": 2}')
    assert [d.text for d in documents(root)] == ["a", "b"]
    (root / "rows.jsonl").rename(root / "rows.json")
    for name in ("README.md", "info.json"):
        (root / name).unlink()
    assert [d.text for d in documents(root)] == ["a", "b"]


def test_hidden_files_are_skipped(tmp_path):
    root = tmp_path / ".cache" / "project"
    for name in (".git/config", "src/.hidden.c", "src/a.c"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    assert [d.path for d in documents(root)] == ["src/a.c"]


def test_numbers_are_no_text(tmp_path):
    file = tmp_path / "numbers.jsonl"
    file.write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match=r"column 'text' of .*numbers.jsonl must hold text, got 1"):
        documents(file)
