"""Atomic writes: whole or not at all, and what was there before stays when the disk refuses."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from soppu import files
from soppu.errors import StorageError


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `limit` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_folders_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "value.txt"
    files.write_text(path, "žluťoučký")
    assert path.read_bytes() == "žluťoučký".encode()
    assert names(path.parent) == ["value.txt"]


def test_a_refused_write_leaves_the_old_value_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "value.bin"
    files.write_bytes(path, b"old")
    with full_disk(1000), pytest.raises(StorageError, match=r"value\.bin: write failed"):
        files.write_bytes(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["value.bin"]


def test_a_refused_first_write_leaves_no_file(tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(StorageError):
        files.write_bytes(tmp_path / "value.bin", b"x" * 5000)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="write failed"):
        files.write_text(tmp_path / "file" / "value.txt", "x")


def test_an_exception_in_the_block_changes_nothing_and_comes_through(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["value.txt"]


def test_the_value_is_not_visible_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    with files.atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename is atomic only within one file system
    assert path.read_text() == "whole"


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    """A temporary file is its maker's alone; a server that runs as another user has to read the result."""
    files.write_text(tmp_path / "value.txt", "x")
    assert (tmp_path / "value.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_file_equals_hashlib_around_the_chunk_size(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "data").write_bytes(data)
    assert files.sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
