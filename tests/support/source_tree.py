"""A small tree of source files, and readers of it: shared by tests of sources, packing and scripts."""

from __future__ import annotations

from pathlib import Path

from patchkernels.data.corpus import DataConfig, prepare
from patchkernels.data.sources import Document, find_source

ENDINGS = (".c", ".h")


def write_tree(root: Path) -> Path:
    """Writes source files, a directory that was copied and edited, Makefiles, a duplicate, and files without text."""
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


def documents(path: Path, endings: tuple[str, ...] = ()) -> list[Document]:
    """The documents of the source at ``path``."""
    source = find_source(str(path), "text", endings)
    source.load(path.parent / "arrow")
    return list(source.documents())


def data_settings(path: Path, cache_folder: Path, endings: tuple[str, ...] = ()) -> DataConfig:
    """Settings with a vocabulary of 300 tokens and a fifth of the text held out, cached in ``cache_folder``."""
    cache = str(cache_folder / "cache")
    return DataConfig(path=str(path), endings=endings, vocab_size=300, validation_fraction=0.2, cache_dir=cache)


def sides(path: Path, cache_folder: Path, endings: tuple[str, ...] = ()) -> tuple[set[str], set[str]]:
    """The texts of the training documents and of the held-out ones."""
    corpus = prepare(data_settings(path, cache_folder, endings))

    def texts(ids: list[int]) -> set[str]:
        text = corpus.tokenizer.decode(ids, skip_special_tokens=False)
        return {part for part in text.split("<|endoftext|>") if part}

    return texts(corpus.train.ids.tolist()), texts(corpus.validation.ids.tolist())
