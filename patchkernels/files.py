"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Creates or replaces a file in one step: whoever opens ``path`` finds the old content or the new, never a part.

    ``write`` is called with a temporary path in the same folder and writes the content there. The content is then
    flushed to the disk, and only after that is the temporary file renamed to ``path``, so that a crash of the process
    or of the machine cannot leave an incomplete file behind. If ``write`` raises an exception, it is passed on, the old
    file stays as it was, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
