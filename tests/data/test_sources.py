"""The sources of text: their documents, and the documents that are held out together."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from source_tree import ENDINGS, documents, sides, write_tree

from patchkernels.data.sources import COMMON_NAME_DOCUMENTS, find_source, split_keys, standard_library


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def test_endings_text_and_content_choose_the_documents(tree):
    found = documents(tree, ENDINGS)
    paths = {document.path for document in found}
    expected = {f"drivers/d{i}/unit{i}.c" for i in range(40)} | {
        f"arch/{a}/include/header{i}.h" for a in "ab" for i in range(20)
    }
    # copy.c has the text of unit7.c and is read first
    assert paths == expected - {"drivers/d7/unit7.c"} | {"copy.c"}
    assert len({document.text for document in found}) == len(found)
    with pytest.raises(ValueError, match=r"no file ends with any of \.rs, \.go"):
        find_source(str(tree), "text", (".rs", ".go"))


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
    if keys == digests:  # all have one name, or none has a path
        return
    common = max(COMMON_NAME_DOCUMENTS, len(found) // 100)
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


def test_the_default_corpus_is_the_standard_library_without_its_tests():
    files = standard_library()
    assert files == standard_library()
    assert {"argparse.py", "dataclasses.py"} <= {file.name for file in files}
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in files)
    assert 8e6 < sum(file.stat().st_size for file in files) < 3e7
    assert {document.path for document in find_source(None, "text").documents()} >= {"argparse.py", "dataclasses.py"}
