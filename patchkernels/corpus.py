"""A corpus in one file: text of any source, or a slice of N megabytes of it, as compressed Parquet."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from patchkernels.pretrained import replace_file
from patchkernels.sources import ORIGIN, PATH_COLUMN, Source

ROW_GROUP_BYTES = 2**25  # of text that is compressed as one piece


@dataclass(frozen=True)
class CorpusConfig:
    """What `patchkernels corpus` packs into one compressed Parquet file, for any --data.path."""

    out: str
    """The file to write, ending in .parquet."""
    path: str | None = None
    """As --data.path of the training run: a file, a folder, a hub dataset's name; None: the standard library."""
    text_field: str = "text"
    """The column of JSONL, Parquet and hub datasets that holds the text; one named "path" tells files apart."""
    endings: tuple[str, ...] = ()
    """Of a folder's files, those that end so; none: all."""
    megabytes: float | None = None
    """A slice of so many million bytes of text: documents chosen by a hash of their content; None: all."""
    origin: str | None = None
    """What reports call the corpus, best with its version; None: the name of the path."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".parquet":
            raise ValueError(f"out must end in .parquet, got {self.out!r}")
        if self.megabytes is not None and not self.megabytes > 0:
            raise ValueError(f"megabytes must be positive, got {self.megabytes}")


def pack_corpus(config: CorpusConfig) -> dict[str, Any]:
    """Writes the file, whole or not at all, and returns what it holds: documents, bytes, endings.

    Raises:
        FileNotFoundError, ValueError: those of :class:`patchkernels.sources.Source`; no text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = Path(config.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    source = Source(config.path, config.text_field, config.endings)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as arrow:
        source.load(Path(arrow))
        sizes = {document.digest: len(document.text.encode()) for document in source.documents()}
        if not sizes:
            raise ValueError(f"{config.path}: no UTF-8 text")
        chosen, left = set(), float("inf") if config.megabytes is None else config.megabytes * 1e6
        for digest in sorted(sizes):
            if sizes[digest] <= left:
                chosen.add(digest)
                left -= sizes[digest]
        if not chosen:
            raise ValueError(f"no document of {config.path} is as small as {config.megabytes} MB")
        origin = config.origin or source.origin
        if config.megabytes is not None:
            origin += f", {sum(sizes[d] for d in chosen) / 1e6:.1f} of {sum(sizes.values()) / 1e6:.1f} MB"
        schema = pa.schema([("text", pa.large_string()), (PATH_COLUMN, pa.string())], metadata={ORIGIN: origin})
        endings: Counter[str] = Counter()

        def write(file: Path) -> None:
            # In the order of the source: files of one directory resemble each other, which compresses them.
            with pq.ParquetWriter(
                file, schema, compression="zstd", compression_level=19, use_dictionary=False,
                data_page_size=ROW_GROUP_BYTES, write_statistics=False,
            ) as writer:  # fmt: skip
                rows: dict[str, list[str | None]] = {"text": [], PATH_COLUMN: []}
                held = 0
                for document in source.documents():
                    if document.digest in chosen:
                        size = sizes[document.digest]
                        rows["text"].append(document.text)
                        rows[PATH_COLUMN].append(document.path)
                        endings[PurePosixPath(document.path or "").suffix] += size
                        held += size
                    if held > ROW_GROUP_BYTES:
                        writer.write_table(pa.table(rows, schema))
                        rows, held = {"text": [], PATH_COLUMN: []}, 0
                writer.write_table(pa.table(rows, schema))

        replace_file(out, write)
    return {
        "origin": origin, "documents": len(chosen), "bytes": sum(sizes[d] for d in chosen),
        "compressed": out.stat().st_size, "endings": dict(endings.most_common()),
    }  # fmt: skip


def print_corpus(config: CorpusConfig) -> None:
    said = pack_corpus(config)
    print(f"{config.out}: {said['origin']}")
    print(
        f"{said['documents']:,} documents, {said['bytes'] / 1e6:.1f} MB of text in {said['compressed'] / 1e6:.1f} MB; "
        f"bytes by ending: {json.dumps(said['endings'])}"
    )
