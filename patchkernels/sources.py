"""Where text comes from: files, a column of JSONL, Parquet or a dataset of the hub -> documents, each content once."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

COLUMN_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COPIES = 20  # documents of one name that are taken for copies of each other, however few there are in all
PATH_COLUMN = "path"
ORIGIN = b"patchkernels.origin"  # in the metadata of a Parquet file
BATCH = 256  # rows read at a time


class Document(NamedTuple):
    text: str
    path: str | None  # within the source; None: the text is a paragraph or a row without a path

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()


def split_keys(paths: list[str | None], digests: list[bytes]) -> list[bytes]:
    """Documents that share a key belong on one side of the held-out split.

    Files of one name share it, so that neither a file nor a directory has an edited copy of itself on the other side. A
    name that more than 20 documents and more than 1 % of them bear (Makefile) says little: there it counts with its
    directory's name. Documents without a path: those of one content.
    """
    count = Counter(PurePosixPath(path).name for path in paths if path is not None)
    common = max(COPIES, len(paths) // 100)
    keys = []
    for path, digest in zip(paths, digests):
        if path is None:
            keys.append(digest)
            continue
        parts = PurePosixPath(path).parts
        name = "/".join(parts[-2:] if count[parts[-1]] > common else parts[-1:])
        keys.append(hashlib.sha256(name.encode()).digest())
    return keys if len(set(keys)) > 1 else digests


class Source:
    """The documents of a path, a hub dataset or the standard library; ``digest`` names their content.

    Raises:
        FileNotFoundError: no such file or folder, and no dataset of that name.
        ValueError: no text, nothing of the wanted endings, a missing column (when documents are read).
    """

    def __init__(self, path: str | None, text_field: str, endings: tuple[str, ...] = ()) -> None:
        self.path, self.text_field = path, text_field
        self.rows: Any = None  # of a dataset
        self.files: list[Path] = []
        local = None if path is None else Path(path).expanduser()
        self.root = local if local else Path(sysconfig.get_paths()["stdlib"])
        if local is None:
            self.files = standard_library()
        elif local.is_dir():
            shown = (p for p in local.rglob("*") if "/." not in f"/{p.relative_to(local).as_posix()}")
            self.files = sorted(p for p in shown if p.is_file() and not p.is_symlink())
            if endings:
                self.files = [p for p in self.files if p.name.endswith(endings)]
                if not self.files:
                    raise ValueError(f"{path}: no file ends with any of {', '.join(endings)}")
        elif local.is_file():
            self.files, self.root = [local], local.parent
        else:
            self.rows = _hub(str(path))
        self.column_endings = _column_endings(self.files)
        self.kind = next((COLUMN_KINDS[ending] for ending in self.column_endings), "text")
        self.one_text = self.kind == "text" and bool(local and local.is_file())
        if self.rows is not None:
            self.digest = str(self.rows._fingerprint)
        else:
            named = (f"{file.relative_to(self.root)}\0{file_digest(file)}\n" for file in self.files)
            self.digest = hashlib.sha256("".join(named).encode()).hexdigest()

    @property
    def origin(self) -> str:
        """What a report calls it, with a version where there is one."""
        if self.path is None:
            return f"the standard library of Python {platform.python_version()}"
        if len(self.files) == 1 and self.kind == "parquet":
            import pyarrow.parquet

            said = (pyarrow.parquet.read_schema(self.files[0]).metadata or {}).get(ORIGIN)
            if said:
                return str(said.decode())
        return self.path if self.rows is not None else Path(self.path).expanduser().resolve().name

    def load(self, arrow: Path) -> None:
        """Columns and paragraphs become a dataset, through Arrow files in ``arrow``: never whole in memory."""
        if self.rows is None and (self.kind != "text" or self.one_text):
            self.rows = self._local(arrow)
        if self.rows is None:
            return
        column = "text" if self.one_text else self.text_field
        if column not in self.rows.column_names:
            raise ValueError(f"no column {column!r} in {self.path}; it has {self.rows.column_names}")
        self.columns = [column, *{PATH_COLUMN} & set(self.rows.column_names)]
        self.rows = self.rows.select_columns(self.columns)

    def _local(self, arrow: Path) -> Any:
        import datasets

        if self.one_text and read_text(self.files[0]) is None:
            raise ValueError(f"{self.path}: no UTF-8 text")
        names = [str(file) for file in self.files if self.kind == "text" or file.suffix in self.column_endings]
        options = {"sample_by": "paragraph"} if self.one_text else {}
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(self.kind, data_files=names, split="train", cache_dir=str(arrow), **options)
        except Exception as error:
            raise ValueError(f"{self.path} could not be read as {self.kind}: {error.__cause__ or error}") from error

    def documents(self) -> Iterator[Document]:
        """In a fixed order; of documents of one content the first alone, and none that is blank."""
        seen = set()
        for document in self._documents():
            if document.text.strip() and (digest := document.digest) not in seen:
                seen.add(digest)
                yield document

    def _documents(self) -> Iterator[Document]:
        if self.rows is None:
            for file in self.files:
                if (text := read_text(file)) is not None:
                    yield Document(text, file.relative_to(self.root).as_posix())
            return
        for batch in self.rows.iter(BATCH):
            texts = batch[self.columns[0]]
            if wrong := [t for t in texts if not isinstance(t, (str, type(None)))]:
                raise ValueError(f"column {self.columns[0]!r} of {self.path} must hold text, got {wrong[0]!r}")
            paths: Iterable[Any] = batch[PATH_COLUMN] if PATH_COLUMN in self.columns[1:] else [None] * len(texts)
            yield from (Document(t, p if isinstance(p, str) else None) for t, p in zip(texts, paths) if t)


def _column_endings(files: list[Path]) -> set[str]:
    """Of a folder of Parquet or JSONL the rows are read, whatever lies beside them; a .json among texts is a text."""
    endings = {file.suffix for file in files}
    if endings <= {".json", ".jsonl"}:
        return endings
    return next(({ending} for ending in (".parquet", ".jsonl") if ending in endings), set())


def _hub(name: str) -> Any:
    import datasets

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in {*COLUMN_KINDS, ".txt", ".md"}:
        raise FileNotFoundError(f"no file or folder {name!r}")
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        raise FileNotFoundError(
            f"no file or folder {name!r}; taken as a dataset's name on the hub, it could not be loaded: {error}"
        ) from error


def standard_library() -> list[Path]:
    """The source files of the running Python's standard library, without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def read_text(file: Path) -> str | None:
    """The file if it is UTF-8 throughout and has no zero byte."""
    content = file.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
