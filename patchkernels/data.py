"""Text to tokens: a corpus, its tokenizer, and memory-mapped ids, cached by content and settings.

documents -> held-out split by content -> BPE of the training documents -> ids, each document closed by end-of-text
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patchkernels.pretrained import replace_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("patchkernels")

FORMAT = 1  # of the cache
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
BATCH = 256  # documents encoded at a time
COLUMN_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    path: str | None = None
    """A text file (its paragraphs are documents), a folder of text files (one a document), a .jsonl or .parquet file
    or a folder of them, or a dataset's name on the Hugging Face hub. None: the source text of the running Python's
    standard library."""
    text_field: str = "text"
    """The column of JSONL, Parquet and hub datasets that holds the text."""
    tokenizer: str | None = None
    """A tokenizer.json; None: a byte-level BPE trained on the training documents."""
    vocab_size: int = 4096
    """Of the BPE that is trained."""
    validation_fraction: float = 0.02
    """Of the documents, chosen by a hash of their content."""
    document_multiple: int = 1
    """Every document is padded with end-of-text to a multiple of this (for packed documents)."""
    cache_dir: str | None = None
    """Default: patchkernels/ in the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.vocab_size < 257:
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
    source = _Source(config)
    settings = [FORMAT, source.digest, config.text_field, config.validation_fraction, config.document_multiple]
    settings.append(_file_digest(_tokenizer_file(config.tokenizer)) if config.tokenizer else config.vocab_size)
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]
    folder = root / digest
    if folder.exists():
        try:
            return _open(folder, digest)
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
    return _open(folder, digest)


class _Source:
    """The documents of a configuration and a digest of their content."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.rows: Any = None  # a dataset of the hub
        self.files: list[Path] = []
        if config.path is None:
            self.files = standard_library()
        elif Path(config.path).expanduser().is_dir():
            self.files = sorted(p for p in Path(config.path).expanduser().rglob("*") if p.is_file())
        elif Path(config.path).expanduser().is_file():
            self.files = [Path(config.path).expanduser()]
        else:
            self.rows = self._hub(config.path)
        if self.rows is not None:
            self.digest = str(self.rows._fingerprint)
        else:
            names = b"".join(bytes.fromhex(_file_digest(path)) for path in self.files)
            self.digest = hashlib.sha256(names).hexdigest()

    def _hub(self, name: str) -> Any:
        import datasets

        if (
            name.startswith((".", "/", "~"))
            or name.count("/") > 1
            or Path(name).suffix in {*COLUMN_KINDS, ".txt", ".md"}
        ):
            raise FileNotFoundError(f"no file or folder {name!r}")
        try:
            return datasets.load_dataset(name, split="train")
        except Exception as error:
            raise FileNotFoundError(
                f"no file or folder {name!r}; taken as a dataset's name on the hub, it could not be loaded: {error}"
            ) from error

    def load(self, arrow: Path) -> None:
        """Local files become a dataset, through Arrow files in the folder ``arrow``: never whole in memory."""
        column = self.config.text_field
        if self.rows is None:
            kind = next((COLUMN_KINDS[path.suffix] for path in self.files if path.suffix in COLUMN_KINDS), "text")
            if kind == "text":
                column = "text"
            self.rows = self._local(kind, arrow)
        if column not in self.rows.column_names:
            raise ValueError(f"no column {column!r} in {self.config.path}; it has {self.rows.column_names}")
        self.rows = self.rows.select_columns([column])

    def _local(self, kind: str, arrow: Path) -> Any:
        import datasets

        options = {}
        if kind == "text":
            files = [path for path in self.files if _is_text(path)]
            if not files:
                raise ValueError(f"{self.config.path}: no UTF-8 text")
            one_file = self.config.path is not None and Path(self.config.path).expanduser().is_file()
            options["sample_by"] = "paragraph" if one_file else "document"
        else:
            files = [path for path in self.files if COLUMN_KINDS.get(path.suffix) == kind]
        datasets.disable_progress_bars()
        names = [str(path) for path in files]
        try:
            return datasets.load_dataset(kind, data_files=names, split="train", cache_dir=str(arrow), **options)
        except Exception as error:
            raise ValueError(f"{self.config.path} could not be read as {kind}: {error}") from error

    def documents(self) -> Iterator[str]:
        (column,) = self.rows.column_names
        for batch in self.rows.iter(BATCH):
            yield from (text for text in batch[column] if text and text.strip())


def standard_library() -> list[Path]:
    """The source files of the running Python's standard library, without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def _is_text(path: Path) -> bool:
    """UTF-8 throughout, without a zero byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(2**20):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _held_out(text: str, fraction: float) -> bool:
    """By content alone, so that identical documents are on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


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


def _write(folder: Path, config: DataConfig, source: _Source, progress: Progress) -> None:
    progress("reading", 0, 0)
    source.load(folder / "arrow")
    split: dict[bool, list[tuple[bytes, int]]] = {True: [], False: []}
    total = 0
    for text in source.documents():
        key = hashlib.sha256(text.encode()).digest()
        split[_held_out(text, config.validation_fraction)].append((key, total))
        total += 1
        progress("reading documents", total, 0)
    if total < 2:
        raise ValueError(f"{config.path}: {total} documents with text; two are needed, one of them to hold out")
    for side in (True, False):  # a small corpus may hash to one side: move its lowest document
        if not split[side]:
            split[not side].sort()
            split[side].append(split[not side].pop(0))
    held_out = {index for _, index in split[True]}
    if config.tokenizer:
        shutil.copyfile(_tokenizer_file(config.tokenizer), folder / "tokenizer.json")
    else:
        progress("training the tokenizer", 0, 0)
        training = (text for i, text in enumerate(source.documents()) if i not in held_out)
        _train_tokenizer(training, config.vocab_size, folder / "tokenizer.json")
    tokenizer, end_of_text = _load_tokenizer(folder / "tokenizer.json")
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    # Encoded in the order of the source, then written in that of the hash: a shuffle that never changes.
    lengths = np.zeros(total, np.int64)
    validation_bytes = 0
    with open(folder / "source.bin", "wb") as file:
        for first, batch in _batches(source.documents()):
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
        order = [index for _, index in sorted(split[side])]
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


def _open(folder: Path, digest: str) -> Corpus:
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
