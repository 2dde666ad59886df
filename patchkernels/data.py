"""Text to tokens: a corpus, its tokenizer, and memory-mapped ids, cached by content and settings.

documents -> held-out split by file name or content -> BPE of the training documents -> ids, each closed by end-of-text
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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patchkernels.pretrained import replace_file
from patchkernels.sources import Source, file_digest, split_keys

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("patchkernels")

FORMAT = 2  # of the cache
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
BATCH = 256  # documents encoded at a time


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    path: str | None = None
    """A text file (its paragraphs are documents), a folder of text files (one a document; hidden ones are skipped), a
    .jsonl or .parquet file or a folder that has them, or a dataset's name on the Hugging Face hub. None: the source
    text of the running Python's standard library."""
    text_field: str = "text"
    """The column of JSONL, Parquet and hub datasets that holds the text; one named "path" tells files apart."""
    endings: tuple[str, ...] = ()
    """Of a folder's files, those that end so; none: all."""
    tokenizer: str | None = None
    """A tokenizer.json; None: a byte-level BPE trained on the training documents."""
    vocab_size: int | None = None
    """Of the BPE that is trained; None: 4096, or that of an experiment's budget."""
    validation_fraction: float = 0.05
    """Of the documents, chosen by a hash of their file's name, or of their content where they are not files."""
    document_multiple: int = 1
    """Every document is padded with end-of-text to a multiple of this (for packed documents)."""
    cache_dir: str | None = None
    """Default: patchkernels/ in the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257, the bytes and end-of-text, got {self.vocab_size}")
        if self.document_multiple < 1:
            raise ValueError(f"document_multiple must be at least 1, got {self.document_multiple}")


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, memory-mapped, and where its documents begin."""

    ids: npt.NDArray[Any]  # (L,), uint16 or uint32
    document_starts: npt.NDArray[np.int64]  # ascending, the first is 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; ``digest`` names its content and settings."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    tokenizer_file: Path
    vocab_size: int
    end_of_text: int
    bytes_per_token: float  # of the validation text
    origin: str  # what a report calls the source
    documents: dict[str, int]  # of "train" and of "validation"
    digest: str


Progress = Callable[[str, int, int], None]  # what, done, of how many


def _quiet(what: str, done: int, total: int) -> None:
    pass


def prepare(config: DataConfig, progress: Progress = _quiet) -> Corpus:
    """The corpus of ``config``, from the cache if it is there.

    The cache folder is complete or absent: it is written beside its place and renamed. One that is damaged is
    made anew, with a warning.

    Raises:
        FileNotFoundError: no such file or folder, and no dataset of that name.
        ValueError: no text, too few documents for a held-out split, a missing column, an unusable tokenizer.
        OSError: a cache folder that cannot be written.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchkernels"
    root = Path(config.cache_dir).expanduser() if config.cache_dir else user
    root.mkdir(parents=True, exist_ok=True)
    source = Source(config.path, config.text_field, config.endings)
    settings = [FORMAT, source.digest, config.text_field, config.validation_fraction, config.document_multiple]
    settings.append(
        file_digest(_tokenizer_file(config.tokenizer)) if config.tokenizer else config.vocab_size or VOCAB_SIZE
    )
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]
    folder = root / digest
    if folder.exists():
        try:
            return _open(folder, digest, source.origin)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("the token cache %s is damaged (%s); making it anew", folder, error)
            shutil.rmtree(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=root))
    try:
        _write(temporary, config, source, progress)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open(folder, digest, source.origin)


def _held_out(key: bytes, fraction: float) -> bool:
    """By the key alone, so that documents that share it are on the same side."""
    return int.from_bytes(key[:8], "big") < fraction * 2**64


def _tokenizer_file(path: str) -> Path:
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer file {str(file)!r}")
    return file


def _load_tokenizer(file: Path) -> tuple[Any, int]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"{file} is not a tokenizer that tokenizers reads: {error}") from error
    for name in END_OF_TEXT_NAMES:
        end_of_text = tokenizer.token_to_id(name)
        if end_of_text is not None:
            return tokenizer, end_of_text
    raise ValueError(f"{file} has no end-of-text token: none of {END_OF_TEXT_NAMES}")


def _train_tokenizer(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))


def pack(documents: Iterable[list[int]], end_of_text: int, multiple: int) -> Iterator[list[int]]:
    """Each document, closed by end-of-text and padded with it to a multiple."""
    for ids in documents:
        length = len(ids) + 1
        yield [*ids, *[end_of_text] * (1 + -length % multiple)]


def _write(folder: Path, config: DataConfig, source: Source, progress: Progress) -> None:
    progress("reading", 0, 0)
    source.load(folder / "arrow")
    paths: list[str | None] = []
    digests: list[bytes] = []
    for document in source.documents():
        paths.append(document.path)
        digests.append(document.digest)
        progress("reading documents", len(paths), 0)
    total = len(paths)
    if total < 2:
        what = "no UTF-8 text" if total == 0 else f"{total} documents with text"
        raise ValueError(f"{config.path}: {what}; two are needed, one of them to hold out")
    keys = split_keys(paths, digests)
    held_out_keys = {key for key in keys if _held_out(key, config.validation_fraction)}
    if not held_out_keys or held_out_keys == set(keys):  # a small corpus may hash to one side
        held_out_keys = {min(keys)}
    held_out = {index for index, key in enumerate(keys) if key in held_out_keys}
    if config.tokenizer:
        shutil.copyfile(_tokenizer_file(config.tokenizer), folder / "tokenizer.json")
    else:
        progress("training the tokenizer", 0, 0)
        training = (document.text for i, document in enumerate(source.documents()) if i not in held_out)
        _train_tokenizer(training, config.vocab_size or VOCAB_SIZE, folder / "tokenizer.json")
    tokenizer, end_of_text = _load_tokenizer(folder / "tokenizer.json")
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    # Encoded in the order of the source, then written in that of the hash: a shuffle that never changes.
    lengths = np.zeros(total, np.int64)
    validation_bytes = 0
    with open(folder / "source.bin", "wb") as file:
        for first, batch in _batches(document.text for document in source.documents()):
            encoded = tokenizer.encode_batch(batch, add_special_tokens=False)
            packed = pack((e.ids for e in encoded), end_of_text, config.document_multiple)
            for index, (text, ids) in enumerate(zip(batch, packed), start=first):
                lengths[index] = len(ids)
                file.write(np.asarray(ids, dtype).tobytes())
                validation_bytes += len(text.encode()) if index in held_out else 0
            progress("encoding", first + len(batch), total)
    source_ids = np.memmap(folder / "source.bin", dtype, "r")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for name, side in (("train", False), ("validation", True)):
        order = sorted((i for i in range(total) if (i in held_out) == side), key=digests.__getitem__)
        with open(folder / f"{name}.bin", "wb") as file:
            for index in order:
                file.write(source_ids[offsets[index] : offsets[index + 1]].tobytes())
        np.save(folder / f"{name}_starts.npy", np.concatenate([[0], np.cumsum(lengths[order])[:-1]]).astype(np.int64))
    del source_ids
    (folder / "source.bin").unlink()
    shutil.rmtree(folder / "arrow", ignore_errors=True)  # hub datasets have none here
    counts = {"validation": int(lengths[sorted(held_out)].sum())}
    counts["train"] = int(lengths.sum()) - counts["validation"]
    meta = {
        "tokens": counts,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "end_of_text": end_of_text,
        "bytes_per_token": validation_bytes / counts["validation"],
        "documents": {"train": total - len(held_out), "validation": len(held_out)},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _batches(documents: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    batch: list[str] = []
    first = 0
    for text in documents:
        batch.append(text)
        if len(batch) == BATCH:
            yield first, batch
            first, batch = first + BATCH, []
    if batch:
        yield first, batch


def _open(folder: Path, digest: str, origin: str) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    streams = {}
    for name in ("train", "validation"):
        ids = np.memmap(folder / f"{name}.bin", np.dtype(meta["dtype"]), "r")
        starts = np.load(folder / f"{name}_starts.npy")
        if len(ids) != meta["tokens"][name] or int(ids[-1]) != meta["end_of_text"]:
            raise ValueError(f"{name}.bin does not hold the {meta['tokens'][name]} tokens it should")
        streams[name] = Tokens(ids, starts)
    tokenizer, end_of_text = _load_tokenizer(folder / "tokenizer.json")
    return Corpus(
        **streams,
        tokenizer=tokenizer,
        tokenizer_file=folder / "tokenizer.json",
        vocab_size=meta["vocab_size"],
        end_of_text=end_of_text,
        bytes_per_token=meta["bytes_per_token"],
        origin=origin,
        documents=meta["documents"],
        digest=digest,
    )


def save_tokenizer(corpus: Corpus, folder: Path, longest: int) -> None:
    """As AutoTokenizer of transformers reads it."""
    name = corpus.tokenizer.id_to_token(corpus.end_of_text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name, "bos_token": name,
                "model_max_length": longest}  # fmt: skip
    tokenizer = corpus.tokenizer_file.read_text()
    replace_file(folder / "tokenizer.json", lambda path: path.write_text(tokenizer))
    replace_file(folder / "tokenizer_config.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
