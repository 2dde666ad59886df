"""A corpus in one file: the text of any source, or a part of it, as compressed Parquet."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from patchkernels.data.sources import ORIGIN_METADATA, PATH_COLUMN, Source, find_source
from patchkernels.files import replace_file

ROW_GROUP_BYTES = 2**25  # of text compressed together: a larger group compresses better, but takes more memory


@dataclass(frozen=True)
class CorpusConfig:
    """Packs the text of any source into one compressed Parquet file, to be used as --data.path of a run."""

    out: str
    """The file to write. Its name must end in .parquet."""
    path: str | None = None
    """The text, as in --data.path of a run: a file, a folder, or the name of a dataset on the Hugging Face hub. None:
    the source text of the running Python's standard library."""
    text_field: str = "text"
    """The column of JSONL, Parquet and hub datasets that holds the text. A column named "path", if there is one, names
    the file that a row comes from."""
    endings: tuple[str, ...] = ()
    """Endings of the names of the files that are read from a folder, such as .py .md. Empty: all files."""
    megabytes: float | None = None
    """Pack at most this many million bytes of text. The documents come from all over the source, chosen by a hash of
    their content. None: all documents."""
    origin: str | None = None
    """Name of the corpus in reports, preferably with a version. None: the name of the path."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".parquet":
            raise ValueError(f"out must end in .parquet, got {self.out!r}")
        if self.megabytes is not None and not self.megabytes > 0:
            raise ValueError(f"megabytes must be positive, got {self.megabytes}")


class PackedCorpus(NamedTuple):
    """A summary of a packed file."""

    origin: str
    documents: int
    text_bytes: int
    file_bytes: int  # compressed
    endings: dict[str, int]  # bytes of text by the ending of the documents' paths, largest first


class _Summary(NamedTuple):
    """The properties of a document that are kept between the first and the second reading of the source."""

    ending: str
    text_bytes: int


def pack_corpus(config: CorpusConfig) -> PackedCorpus:
    """Writes the file, whole or not at all, and returns a summary of it.

    Raises:
        FileNotFoundError, ValueError: as :func:`patchkernels.data.sources.find_source`; also if there is no text, or no
            document that fits into ``megabytes``.
    """
    out = Path(config.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    source = find_source(config.path, config.text_field, config.endings)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as arrow:
        source.load(Path(arrow))
        found = {
            document.digest: _Summary(PurePosixPath(document.path or "").suffix, len(document.text.encode()))
            for document in source.documents()
        }
        if not found:
            raise ValueError(f"{config.path}: no UTF-8 text")
        chosen = found if config.megabytes is None else _choose(found, config.megabytes * 1e6)
        if not chosen:
            raise ValueError(f"no document of {config.path} is as small as {config.megabytes} MB")
        text_bytes = sum(summary.text_bytes for summary in chosen.values())
        origin = config.origin or source.origin
        if config.megabytes is not None:
            whole = sum(summary.text_bytes for summary in found.values())
            origin += f", {text_bytes / 1e6:.1f} of {whole / 1e6:.1f} MB"
        replace_file(out, lambda file: _write_parquet(file, source, chosen, origin))
    endings: Counter[str] = Counter()
    for summary in chosen.values():
        endings[summary.ending] += summary.text_bytes
    return PackedCorpus(origin, len(chosen), text_bytes, out.stat().st_size, dict(endings.most_common()))


def _choose(found: dict[bytes, _Summary], most_bytes: float) -> dict[bytes, _Summary]:
    """Takes the documents in the order of their hash, each that still fits into ``most_bytes`` in all."""
    chosen, left = set(), most_bytes
    for digest in sorted(found):
        if found[digest].text_bytes <= left:
            chosen.add(digest)
            left -= found[digest].text_bytes
    return {digest: summary for digest, summary in found.items() if digest in chosen}


def _write_parquet(file: Path, source: Source, chosen: dict[bytes, _Summary], origin: str) -> None:
    """Writes the chosen documents in the order of the source, where neighbours are alike and compress well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.large_string()), (PATH_COLUMN, pa.string())], metadata={ORIGIN_METADATA: origin})
    with pq.ParquetWriter(
        file, schema, compression="zstd", compression_level=19, use_dictionary=False,
        data_page_size=ROW_GROUP_BYTES, write_statistics=False,
    ) as writer:  # fmt: skip
        texts: list[str] = []
        paths: list[str | None] = []
        held_bytes = 0
        for document in source.documents():
            if (summary := chosen.get(document.digest)) is not None:
                texts.append(document.text)
                paths.append(document.path)
                held_bytes += summary.text_bytes
            if held_bytes > ROW_GROUP_BYTES:
                writer.write_table(pa.table({"text": texts, PATH_COLUMN: paths}, schema))
                texts, paths, held_bytes = [], [], 0
        writer.write_table(pa.table({"text": texts, PATH_COLUMN: paths}, schema))


def print_corpus(config: CorpusConfig) -> None:
    """The command ``patchkernels corpus``: packs the corpus and prints a summary of the file."""
    packed = pack_corpus(config)
    text, file = packed.text_bytes / 1e6, packed.file_bytes / 1e6
    print(
        f"{config.out}: {packed.origin}\n"
        f"{packed.documents:,} documents, {text:.1f} MB of text in {file:.1f} MB; "
        f"bytes by ending: {json.dumps(packed.endings)}"
    )
