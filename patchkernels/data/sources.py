"""Where text comes from: a path, a dataset of the Hugging Face hub or the standard library, as a series of documents.

:func:`find_source` decides which kind of source a path is:

    no path                               StandardLibrary   one document per source file
    a folder of text files                TextFiles         one document per file
    a text file                           Paragraphs        one document per paragraph
    a JSONL or Parquet file, or a folder  RowFiles          one document per row
    anything else                         HubDataset        one document per row

If several documents of a source have the same text, only the first is used.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

ROW_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # file ending to loader of `datasets`
ROWS_READ_AT_ONCE = 256
PATH_COLUMN = "path"  # the column that names the file that a row comes from
ORIGIN_METADATA = b"patchkernels.origin"  # the key of the origin in a Parquet file's metadata
COMMON_NAME_DOCUMENTS = 20  # up to this many documents of one name always count as copies of one file


class Document(NamedTuple):
    text: str
    path: str | None  # within the source; None for paragraphs and for rows without a path

    @property
    def digest(self) -> bytes:
        """A hash of the text."""
        return hashlib.sha256(self.text.encode()).digest()


def split_keys(paths: list[str | None], digests: list[bytes]) -> list[bytes]:
    """A key for each document. Documents with equal keys must be on the same side of the held-out split.

    Files of the same name share a key, so that an edited copy of a file or of its whole directory is on the side of
    its original. A name like Makefile, which more than 20 documents and more than 1 % of all have, says little about
    the content; its key therefore includes the name of the directory. A document without a path has its content's hash
    as its key. So have all documents if they would otherwise share a single key.
    """
    count = Counter(PurePosixPath(path).name for path in paths if path is not None)
    common = max(COMMON_NAME_DOCUMENTS, len(paths) // 100)
    keys = []
    for path, digest in zip(paths, digests):
        if path is None:
            keys.append(digest)
            continue
        parts = PurePosixPath(path).parts
        name = "/".join(parts[-2:] if count[parts[-1]] > common else parts[-1:])
        keys.append(hashlib.sha256(name.encode()).digest())
    return keys if len(set(keys)) > 1 else digests


class Source(ABC):
    """A source of documents, in an order that never changes. ``digest`` identifies their content."""

    digest: str

    @property
    @abstractmethod
    def origin(self) -> str:
        """The name of the source in reports, with a version if one is known."""

    def load(self, arrow: Path) -> None:  # noqa: B027  (files of text need no preparation)
        """Prepares the documents for reading; must be called before :meth:`documents`.

        Rows and paragraphs are converted to Arrow files in the folder ``arrow`` and read from there, so that they are
        never in memory all at once.

        Raises:
            ValueError: a file is damaged or holds no text, or a column is missing.
        """

    def documents(self) -> Iterator[Document]:
        """The documents that hold more than white space. Of several with the same text only the first is given."""
        seen = set()
        for document in self._documents():
            if document.text.strip() and (digest := document.digest) not in seen:
                seen.add(digest)
                yield document

    @abstractmethod
    def _documents(self) -> Iterator[Document]:
        """All documents, also empty ones and duplicates."""


def find_source(path: str | None, text_field: str, endings: tuple[str, ...] = ()) -> Source:
    """The source that ``path`` names; None is the standard library.

    Args:
        text_field: the column that holds the text, where the source has columns.
        endings: only files whose names end with one of these are read from a folder; empty means all files.

    Raises:
        FileNotFoundError: no such file or folder, and no dataset of that name.
        ValueError: no file of the folder has one of the endings.
    """
    if path is None:
        return StandardLibrary()
    local = Path(path).expanduser()
    if local.is_dir():
        files, root = _files_of_folder(local), local
        if endings:
            files = [file for file in files if file.name.endswith(endings)]
            if not files:
                raise ValueError(f"{path}: no file ends with any of {', '.join(endings)}")
    elif local.is_file():
        files, root = [local], local.parent
    else:
        return HubDataset(path, text_field)
    row_endings = _row_endings(files)
    if row_endings:
        return RowFiles(path, files, root, row_endings, text_field)
    if local.is_file():
        return Paragraphs(path, local)
    return TextFiles(path, files, root)


class TextFiles(Source):
    """The files of a folder, one document per file. Files that are not UTF-8 text are skipped."""

    def __init__(self, path: str, files: list[Path], root: Path) -> None:
        self.path, self.files, self.root = path, files, root
        self.digest = _digest_of_files(files, root)

    @property
    def origin(self) -> str:
        return _name_of(self.path)

    def _documents(self) -> Iterator[Document]:
        for file in self.files:
            if (text := read_text(file)) is not None:
                yield Document(text, file.relative_to(self.root).as_posix())


class StandardLibrary(TextFiles):
    """The source files of the running Python's standard library."""

    def __init__(self) -> None:
        super().__init__("the standard library", standard_library(), Path(sysconfig.get_paths()["stdlib"]))

    @property
    def origin(self) -> str:
        return f"{self.path} of Python {platform.python_version()}"


class Rows(Source):
    """The rows of a dataset, one document per row. One column holds the texts; another may hold their paths."""

    def __init__(self, path: str, text_field: str) -> None:
        self.path, self.text_field = path, text_field
        self.has_paths = False

    @abstractmethod
    def _dataset(self, arrow: Path) -> Any:
        """The rows as a ``datasets.Dataset``, which may keep its files in the folder ``arrow``."""

    def load(self, arrow: Path) -> None:
        dataset = self._dataset(arrow)
        if self.text_field not in dataset.column_names:
            raise ValueError(f"no column {self.text_field!r} in {self.path}; it has {dataset.column_names}")
        self.has_paths = PATH_COLUMN in dataset.column_names and self.text_field != PATH_COLUMN
        self.rows = dataset.select_columns([self.text_field, *([PATH_COLUMN] if self.has_paths else [])])

    def _documents(self) -> Iterator[Document]:
        for batch in self.rows.iter(ROWS_READ_AT_ONCE):
            texts = batch[self.text_field]
            if wrong := [text for text in texts if not isinstance(text, (str, type(None)))]:
                raise ValueError(f"column {self.text_field!r} of {self.path} must hold text, got {wrong[0]!r}")
            paths: Iterable[Any] = batch[PATH_COLUMN] if self.has_paths else [None] * len(texts)
            for text, path in zip(texts, paths):
                if text:
                    yield Document(text, path if isinstance(path, str) else None)


class RowFiles(Rows):
    """The rows of JSONL or Parquet files. Other files in their folder are ignored."""

    def __init__(self, path: str, files: list[Path], root: Path, endings: set[str], text_field: str) -> None:
        super().__init__(path, text_field)
        self.files = files
        self.row_files = [file for file in files if file.suffix in endings]
        self.format = ROW_FORMATS[self.row_files[0].suffix]
        self.digest = _digest_of_files(files, root)

    @property
    def origin(self) -> str:
        if len(self.files) == 1 and self.format == "parquet":
            import pyarrow.parquet

            origin = (pyarrow.parquet.read_schema(self.files[0]).metadata or {}).get(ORIGIN_METADATA)
            if origin:
                return str(origin.decode())
        return _name_of(self.path)

    def _dataset(self, arrow: Path) -> Any:
        return _load_files(self.path, self.format, self.row_files, arrow)


class Paragraphs(Rows):
    """The paragraphs of one text file, which are separated by blank lines."""

    def __init__(self, path: str, file: Path) -> None:
        super().__init__(path, text_field="text")  # the column that `datasets` reads text into
        self.file = file
        self.digest = _digest_of_files([file], file.parent)

    @property
    def origin(self) -> str:
        return _name_of(self.path)

    def _dataset(self, arrow: Path) -> Any:
        if read_text(self.file) is None:
            raise ValueError(f"{self.path}: no UTF-8 text")
        return _load_files(self.path, "text", [self.file], arrow, sample_by="paragraph")


class HubDataset(Rows):
    """The training split of a dataset on the Hugging Face hub, kept in the cache of ``datasets``."""

    def __init__(self, name: str, text_field: str) -> None:
        super().__init__(name, text_field)
        self.hub_rows = _load_from_hub(name)
        self.digest = str(self.hub_rows._fingerprint)

    @property
    def origin(self) -> str:
        return self.path

    def _dataset(self, arrow: Path) -> Any:
        return self.hub_rows


def _load_files(path: str, loader: str, files: list[Path], arrow: Path, **options: str) -> Any:
    import datasets

    names = [str(file) for file in files]
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(loader, data_files=names, split="train", cache_dir=str(arrow), **options)
    except Exception as error:
        raise ValueError(f"{path} could not be read as {loader}: {error.__cause__ or error}") from error


def _load_from_hub(name: str) -> Any:
    import datasets

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in {*ROW_FORMATS, ".txt", ".md"}:
        raise FileNotFoundError(f"no file or folder {name!r}")
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        raise FileNotFoundError(
            f"no file or folder {name!r}; taken as a dataset's name on the hub, it could not be loaded: {error}"
        ) from error


def _files_of_folder(folder: Path) -> list[Path]:
    """All files below the folder, sorted, except links, hidden files and the contents of hidden folders."""
    shown = (path for path in folder.rglob("*") if "/." not in f"/{path.relative_to(folder).as_posix()}")
    return sorted(path for path in shown if path.is_file() and not path.is_symlink())


def _row_endings(files: list[Path]) -> set[str]:
    """The endings of the files whose rows are the documents; empty if each file is a text of its own.

    If there are Parquet or JSONL files, their rows are the documents and all other files are ignored. A .json file
    counts as rows only if all files are JSON; among other files it is a text like them.
    """
    endings = {file.suffix for file in files}
    if endings <= {".json", ".jsonl"}:
        return endings
    return next(({ending} for ending in (".parquet", ".jsonl") if ending in endings), set())


def standard_library() -> list[Path]:
    """The source files of the running Python's standard library, without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def read_text(file: Path) -> str | None:
    """The content of the file, or None if it is not UTF-8 throughout or has a zero byte."""
    content = file.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def file_digest(path: Path) -> str:
    """A hash of the file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of_files(files: list[Path], root: Path) -> str:
    """A hash of the files' contents and of their paths below ``root``."""
    named = (f"{file.relative_to(root)}\0{file_digest(file)}\n" for file in files)
    return hashlib.sha256("".join(named).encode()).hexdigest()


def _name_of(path: str) -> str:
    return Path(path).expanduser().resolve().name
