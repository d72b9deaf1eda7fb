"""Atomic writes and content hashes: the two promises every stored thing in SOPPU keeps."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soppu.errors import SoppuError, StorageError


@contextmanager
def atomic_path(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `path`; fsync and rename it into place if the block succeeds.

    Raises:
        StorageError: the disk refused the write. `path` is then what it was before.
    """
    temporary = None
    try:
        if path.exists() and not path.is_file():  # a rename would take the place of a device
            raise FileExistsError("is a folder or a device; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(mode)  # mkstemp makes it 0600, which another user's server could not read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: write failed, nothing was changed: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the holder dies, however it dies.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` atomically. Raises StorageError if the disk refuses it."""
    with atomic_path(path, mode=mode) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write UTF-8 `text` to `path` atomically. Raises StorageError if the disk refuses it."""
    write_bytes(path, text.encode(), mode=mode)


def point(link: Path, name: str) -> None:
    """Make `link` a symbolic link to the file or folder of this name beside it, whatever it was before."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(link)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. O(size), constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_object(path: Path, *, error: type[SoppuError], cure: str) -> dict[str, Any]:
    """Read a JSON object. `error`, which ends in `cure`, if it is none or unreadable; OSError if absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as refused:
        raise error(f"{path}: cannot be read: {refused.strerror}") from None
    except (ValueError, RecursionError) as fault:
        raise error(f"{path}: not JSON: {fault}; {cure}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}, expected an object; {cure}")
    return value


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_name(text: str) -> bool:
    """Whether a file or a folder can have this name: one part of a path, UTF-8, neither "." nor ".."."""
    plain = text.encode(errors="ignore").decode() == text and "\0" not in text
    return plain and Path(text).name == text not in ("", ".", "..")
