"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from patchkernels.files import replace_file


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_is_created_or_replaced(tmp_path, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)

    def fail(temporary: Path) -> None:
        assert temporary.parent == tmp_path, "a rename is one step only within a file system"
        temporary.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({} if old is None else {"file.txt": old})


def test_a_write_that_fails_before_its_first_byte(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "nowhere" / "file.txt", lambda temporary: temporary.write_text("new"))
    assert list(tmp_path.iterdir()) == []


def test_the_content_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")
    flushed = []
    fsync = os.fsync

    def recorded_fsync(descriptor: int) -> None:
        assert path.read_text() == "old", "not renamed yet"
        flushed.append(os.pread(descriptor, 100, 0))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert flushed == [b"new"]
    assert path.read_text() == "new"
