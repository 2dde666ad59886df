"""A corpus as tokens: held-out split, tokenizer and two memory-mapped streams of ids, cached by content and settings.

documents -> training and held-out documents -> BPE of the training documents -> ids, each document closed by
end-of-text
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from patchkernels.data.sources import Source, file_digest, find_source, split_keys
from patchkernels.data.tokenizer import (
    DEFAULT_VOCAB_SIZE,
    TOKENIZER_FILE,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("patchkernels")

FORMAT = 2  # version of the cache folder's format; after a change every corpus is tokenized again
DOCUMENTS_ENCODED_AT_ONCE = 256
STREAMS = ("train", "validation")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    path: str | None = None
    """The text: a text file (each paragraph is a document), a folder of text files (each file is a document; hidden
    files are skipped), a .jsonl or .parquet file or a folder of them (each row is a document), or the name of a dataset
    on the Hugging Face hub. None: the source text of the running Python's standard library."""
    text_field: str = "text"
    """The column of JSONL, Parquet and hub datasets that holds the text. A column named "path", if there is one, names
    the file that a row comes from."""
    endings: tuple[str, ...] = ()
    """Endings of the names of the files that are read from a folder, such as .py .md. Empty: all files."""
    tokenizer: str | None = None
    """A tokenizer.json, or a folder that holds one. None: a byte-level BPE is trained on the training documents."""
    vocab_size: int | None = None
    """Size of the vocabulary of the BPE that is trained. None: 4096, or in an experiment that of its budget."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out. They are chosen by a hash of their file's name, or of their content if
    they come from no file, so that all copies of one file are held out or none is."""
    cache_dir: str | None = None
    """The folder that keeps the tokens for later runs. None: patchkernels/ in the user's cache folder."""

    def check(self) -> None:
        """Raises ``ValueError`` for a setting out of its range."""
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257, the bytes and end-of-text, got {self.vocab_size}")


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, memory-mapped, and where its documents begin."""

    ids: npt.NDArray[Any]  # (L,), uint16 or uint32
    document_starts: npt.NDArray[np.int64]  # ascending, the first is 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. ``digest`` names its content and its settings."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    tokenizer_file: Path
    vocab_size: int
    end_of_text: int
    bytes_per_token: float  # of the validation text
    origin: str  # name of the source in reports
    documents: dict[str, int]  # number of documents in "train" and in "validation"
    digest: str


Counts = npt.NDArray[np.int64]  # a number for every document, in the order of the source
Progress = Callable[[str, int, int], None]  # current activity, number of items done, and in all (0: unknown)


def _no_progress(what: str, done: int, total: int) -> None:
    pass


def prepare(config: DataConfig, progress: Progress = _no_progress, *, document_multiple: int = 1) -> Corpus:
    """The corpus of ``config``: from the cache if it is there, else read, tokenized and cached.

    A cache folder is complete or absent, because it is written under another name and then renamed. If one was damaged
    later, a warning is logged and it is made again.

    Args:
        progress: called with the current activity, for a progress bar.
        document_multiple: every document is padded with end-of-text to a multiple of this many tokens, so that packed
            documents begin on patch boundaries.

    Raises:
        FileNotFoundError: no such file or folder, and no dataset of that name.
        ValueError: no text, too few documents for a held-out split, a missing column, an unusable tokenizer,
            ``document_multiple`` below 1.
        OSError: the cache folder cannot be written.
    """
    config.check()
    if document_multiple < 1:
        raise ValueError(f"document_multiple must be at least 1, got {document_multiple}")
    cache = _cache_folder(config)
    cache.mkdir(parents=True, exist_ok=True)
    source = find_source(config.path, config.text_field, config.endings)
    digest = _digest(config, source, document_multiple)
    folder = cache / digest
    if folder.exists():
        try:
            return _open(folder, digest, source.origin)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("the token cache %s is damaged (%s); making it anew", folder, error)
            shutil.rmtree(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=cache))
    try:
        _write(temporary, config, source, document_multiple, progress)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # if it does, another process has just written the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open(folder, digest, source.origin)


def _cache_folder(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchkernels"


def _digest(config: DataConfig, source: Source, document_multiple: int) -> str:
    """A hash of everything that the tokens depend on."""
    tokenizer: str | int = config.vocab_size or DEFAULT_VOCAB_SIZE
    if config.tokenizer:
        tokenizer = file_digest(find_tokenizer(config.tokenizer))
    settings = [
        FORMAT, source.digest, config.text_field, config.validation_fraction, document_multiple, tokenizer,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]


class _Split(NamedTuple):
    digests: list[bytes]  # of every document, in the order of the source
    held_out: set[int]  # the indices of the documents for validation

    def indices(self, stream: str) -> list[int]:
        """The indices of a stream's documents in the order of their hash: a shuffle that is always the same."""
        chosen = (i for i in range(len(self.digests)) if (i in self.held_out) == (stream == "validation"))
        return sorted(chosen, key=self.digests.__getitem__)


def _write(folder: Path, config: DataConfig, source: Source, document_multiple: int, progress: Progress) -> None:
    """Fills the cache folder with everything that :func:`_open` reads."""
    progress("reading", 0, 0)
    source.load(folder / "arrow")
    split = _split(source, config, progress)
    _write_tokenizer(folder / TOKENIZER_FILE, config, source, split, progress)
    tokenizer, end_of_text = load_tokenizer(folder / TOKENIZER_FILE)
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)

    def encode(texts: list[str]) -> Iterator[list[int]]:
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        return pack((e.ids for e in encoded), end_of_text, document_multiple)

    order = {stream: split.indices(stream) for stream in STREAMS}
    token_counts, byte_counts = _encode(folder / "source.bin", source, encode, dtype, len(split.digests), progress)
    _write_streams(folder, order, token_counts, dtype)
    shutil.rmtree(folder / "arrow", ignore_errors=True)  # absent if the source is text files or on the hub
    tokens = {stream: int(token_counts[order[stream]].sum()) for stream in STREAMS}
    meta = {
        "tokens": tokens,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "end_of_text": end_of_text,
        "bytes_per_token": int(byte_counts[order["validation"]].sum()) / tokens["validation"],
        "documents": {stream: len(order[stream]) for stream in STREAMS},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _split(source: Source, config: DataConfig, progress: Progress) -> _Split:
    """Reads every document once and decides which are held out."""
    paths: list[str | None] = []
    digests: list[bytes] = []
    for document in source.documents():
        paths.append(document.path)
        digests.append(document.digest)
        progress("reading documents", len(paths), 0)
    if len(paths) < 2:
        found = f"{len(paths)} documents with text" if paths else "no UTF-8 text"
        raise ValueError(f"{config.path}: {found}; two are needed, one of them to hold out")
    keys = split_keys(paths, digests)
    held_out_keys = {key for key in keys if _is_held_out(key, config.validation_fraction)}
    if not held_out_keys or held_out_keys == set(keys):  # the keys of a small corpus may all fall on one side
        held_out_keys = {min(keys)}
    return _Split(digests, {index for index, key in enumerate(keys) if key in held_out_keys})


def _is_held_out(key: bytes, fraction: float) -> bool:
    """True for about that fraction of all keys. It depends on the key alone, so that equal keys stay together."""
    return int.from_bytes(key[:8], "big") < fraction * 2**64


def _write_tokenizer(file: Path, config: DataConfig, source: Source, split: _Split, progress: Progress) -> None:
    """Copies the tokenizer that the settings name, or trains one on the training documents."""
    if config.tokenizer:
        shutil.copyfile(find_tokenizer(config.tokenizer), file)
        return
    progress("training the tokenizer", 0, 0)
    texts = (document.text for i, document in enumerate(source.documents()) if i not in split.held_out)
    train_tokenizer(texts, config.vocab_size or DEFAULT_VOCAB_SIZE, file)


def _encode(
    file: Path,
    source: Source,
    encode: Callable[[list[str]], Iterator[list[int]]],
    dtype: np.dtype[Any],
    total: int,
    progress: Progress,
) -> tuple[Counts, Counts]:
    """Writes the ids of all ``total`` documents to ``file``, and returns each document's number of tokens and bytes."""
    token_counts, byte_counts = np.zeros(total, np.int64), np.zeros(total, np.int64)
    with open(file, "wb") as stream:
        for first, texts in _batches(document.text for document in source.documents()):
            for index, (text, ids) in enumerate(zip(texts, encode(texts)), start=first):
                token_counts[index], byte_counts[index] = len(ids), len(text.encode())
                stream.write(np.asarray(ids, dtype).tobytes())
            progress("encoding", first + len(texts), total)
    return token_counts, byte_counts


def _write_streams(folder: Path, order: dict[str, list[int]], token_counts: Counts, dtype: np.dtype[Any]) -> None:
    """Splits ``source.bin`` into the two streams, and writes for each the positions at which its documents begin."""
    source_ids = np.memmap(folder / "source.bin", dtype, "r")
    offsets = np.concatenate([[0], np.cumsum(token_counts)])
    for stream, indices in order.items():
        with open(folder / f"{stream}.bin", "wb") as file:
            for index in indices:
                file.write(source_ids[offsets[index] : offsets[index + 1]].tobytes())
        starts = np.concatenate([[0], np.cumsum(token_counts[indices])[:-1]]).astype(np.int64)
        np.save(folder / f"{stream}_starts.npy", starts)
    del source_ids
    (folder / "source.bin").unlink()


def pack(documents: Iterable[list[int]], end_of_text: int, multiple: int) -> Iterator[list[int]]:
    """Closes each document with end-of-text, repeated until the length is a multiple of ``multiple``."""
    for ids in documents:
        length = len(ids) + 1
        yield [*ids, *[end_of_text] * (1 + -length % multiple)]


def _batches(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Groups the texts that are encoded in one call, each group with the index of its first text."""
    batch: list[str] = []
    first = 0
    for text in texts:
        batch.append(text)
        if len(batch) == DOCUMENTS_ENCODED_AT_ONCE:
            yield first, batch
            first, batch = first + len(batch), []
    if batch:
        yield first, batch


def _open(folder: Path, digest: str, origin: str) -> Corpus:
    """The corpus in a cache folder. ``OSError``, ``ValueError`` or ``KeyError`` if the folder is damaged."""
    meta = json.loads((folder / "meta.json").read_text())
    streams = {}
    for stream in STREAMS:
        ids = np.memmap(folder / f"{stream}.bin", np.dtype(meta["dtype"]), "r")
        starts = np.load(folder / f"{stream}_starts.npy")
        if len(ids) != meta["tokens"][stream] or int(ids[-1]) != meta["end_of_text"]:
            raise ValueError(f"{stream}.bin does not hold the {meta['tokens'][stream]} tokens it should")
        streams[stream] = Tokens(ids, starts)
    tokenizer, end_of_text = load_tokenizer(folder / TOKENIZER_FILE)
    return Corpus(
        **streams,
        tokenizer=tokenizer,
        tokenizer_file=folder / TOKENIZER_FILE,
        vocab_size=meta["vocab_size"],
        end_of_text=end_of_text,
        bytes_per_token=meta["bytes_per_token"],
        origin=origin,
        documents=meta["documents"],
        digest=digest,
    )
