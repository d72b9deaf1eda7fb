"""Immutable files and folders under one root, local or any that fsspec reaches; and small notes that change.

A blob appears whole or not at all and is never overwritten. What a blob must hold is the caller's business:
every `put` and `fetch` is given a `check` that reads it and raises RegistryError if it is something else.
A note is a few bytes that are overwritten (`write`), and read anew each time (`notes`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from soppu import files
from soppu.adapter import IDENTITY_FILE
from soppu.cores.folder import CONFIG_FILE as CORE_FILE
from soppu.errors import RegistryError, StorageError

T = TypeVar("T")
Check = Callable[[Path], T]
_LAST = (IDENTITY_FILE, CORE_FILE)  # of an adapter's folder and of a core's: written when the rest is there
_PASSWORD = re.compile(r"(://[^/:@]*):[^/@]*@")


def open_blobs(root: str | Path, *, cache: str | Path = "") -> Blobs:
    """The store at `root`, a path or an fsspec URL.

    memory:// is for one thread only: all who read one of its files share one position in it (fsspec 2026.9).

    Args:
        cache: folder for local copies of a remote root; "" is one under the user's cache folder
            (XDG_CACHE_HOME), always the same for the same root. A local root has no copies.

    Raises:
        RegistryError: no fsspec backend for this URL.
    """
    name = _PASSWORD.sub(r"\1:***@", str(root))
    try:
        system, path = fsspec.url_to_fs(str(root))
    except (ImportError, ValueError) as error:
        raise RegistryError(f"registry {name}: {error}") from error
    if isinstance(system, LocalFileSystem):
        return LocalBlobs(Path(path))
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    usual = Path(home, "soppu", "registry", hashlib.sha256(str(root).encode()).hexdigest()[:16])
    return RemoteBlobs(system, path, name=name, cache=Path(cache or usual))


class LocalBlobs:
    """Blobs in a folder: written beside their place, synced to disk, then renamed.

    A key is a path below the root: "bundles/x.safetensors", or a folder "adapters/a-0", which counts once it
    holds `soppu.json`, or `core.json`, written last. `here` is a folder on this machine.
    """

    def __init__(self, root: Path) -> None:
        self.root = self.here = root
        self.name = str(root)

    def has(self, key: str) -> bool:
        """True if the blob is there, whole: a file, or a folder with its last file written."""
        path = self.root / key
        return path.is_file() or any((path / last).is_file() for last in _LAST)

    def put(self, key: str, fill: Callable[[Path], None], check: Check[Any]) -> None:
        """Store what `fill` writes at the path it is given; a blob that is there already is only checked.

        Raises:
            StorageError: the write was refused; nothing of it can be seen.
            RegistryError: `check` refused the new blob, or the one that was there.
        """
        path = self.root / key
        if path.exists():
            self.fetch(key, check)
            return
        with _failing(StorageError, f"{self.name}: {key} was not written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(path)
            try:
                fill(temporary)
                check(temporary)
                _seal(temporary)
                temporary.rename(path)
            except OSError:
                if not path.exists():
                    raise
                self.fetch(key, check)  # somebody was faster; files of one name hold the same bytes
            finally:
                _delete(temporary)
            files.sync(path.parent)

    def fetch(self, key: str, check: Check[T]) -> T:
        """Hand a local path of the blob to `check` and return its answer.

        Raises:
            RegistryError: the blob is absent, cannot be read, or `check` refused it.
        """
        path = self.root / key
        if not path.exists():
            raise RegistryError(f"{self.name}: {key} is not in the store")
        with _failing(RegistryError, f"{self.name}: {key} cannot be read"):
            return check(path)

    def size(self, key: str) -> int:
        """Bytes of one file. RegistryError if it is absent."""
        with _failing(RegistryError, f"{self.name}: {key} cannot be read"):
            return (self.root / key).stat().st_size

    def write(self, key: str, text: str) -> None:
        """Write a note, in place of the one that was there. StorageError if that is refused."""
        files.write_text(self.root / key, text)

    def notes(self, folder: str) -> list[bytes]:
        """Every note in a folder, as it is now; none where there is no folder. RegistryError."""
        with _failing(RegistryError, f"{self.name}: {folder} cannot be read"):
            return [path.read_bytes() for path in sorted((self.root / folder).glob("[!.]*"))]

    def remove(self, key: str, *, unfinished: bool = True) -> None:
        """Delete a blob and, if `unfinished`, what was begun in its place. StorageError if that is refused.

        It is renamed first: a folder half deleted is never found under its own name.
        """
        path = self.root / key
        left_over = path.parent.glob(f".{path.name}.*") if unfinished else ()
        with _failing(StorageError, f"{self.name}: {key} was not removed"):
            for left in [path, *left_over]:
                aside = _temporary(path)
                with suppress(FileNotFoundError):  # gone already is what was asked for
                    left.rename(aside)
                _delete(aside)


class RemoteBlobs:
    """The same behind an fsspec file system, read through a local cache that is checked on every use."""

    def __init__(self, system: Any, root: str, *, name: str, cache: Path) -> None:
        self._system = system
        self._root = root.rstrip("/")
        self._cache = LocalBlobs(cache)
        self.here = cache
        self.name = name

    def has(self, key: str) -> bool:
        """A file, or a folder whose last file was uploaded."""
        with self._failing(RegistryError, f"{key} cannot be looked up"):
            self._system.invalidate_cache()  # other machines write here too
            path = self._path(key)
            return any(self._system.isfile(one) for one in (path, *(f"{path}/{last}" for last in _LAST)))

    def put(self, key: str, fill: Callable[[Path], None], check: Check[Any]) -> None:
        """Write and check in a temporary folder, then upload file by file, what makes it whole last."""
        if self.has(key):
            self.fetch(key, check)
            return
        refused = f"{key} was not written"
        with _failing(StorageError, f"{self.name}: {refused}"), tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / Path(key).name
            fill(made)
            check(made)
            with self._failing(StorageError, refused):
                for file, target in _files_of(made, self._path(key)):
                    self._upload(file, target)

    def fetch(self, key: str, check: Check[T]) -> T:
        """Check the local copy, which is downloaded if it is missing or damaged."""
        if self._cache.has(key):
            try:
                return self._cache.fetch(key, check)
            except RegistryError:
                self._cache.remove(key, unfinished=False)  # a copy only: the root decides what is true
        if not self.has(key):
            raise RegistryError(f"{self.name}: {key} is not in the store")
        self._cache.put(key, lambda path: self._download(key, path), check)
        return self._cache.fetch(key, check)

    def size(self, key: str) -> int:
        """Bytes of one file at the root."""
        with self._failing(RegistryError, f"{key} cannot be read"):
            return int(self._system.size(self._path(key)))

    def write(self, key: str, text: str) -> None:
        """Write a note at the root, with one call, which an object store does as a whole."""
        with self._failing(StorageError, f"{key} was not written"):
            path = self._path(key)
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(path, text.encode())

    def notes(self, folder: str) -> list[bytes]:
        """Every note in a folder at the root."""
        with self._failing(RegistryError, f"{folder} cannot be read"):
            self._system.invalidate_cache()  # other machines write here
            try:
                listed = sorted(self._system.ls(self._path(folder), detail=False))
            except FileNotFoundError:
                return []
            return [self._system.cat_file(path) for path in listed]

    def remove(self, key: str) -> None:
        """Delete at the root and in the cache of this machine; copies on others are never read again."""
        path = self._path(key)
        with self._failing(StorageError, f"{key} was not removed"):
            self._system.invalidate_cache()
            for last in _LAST:
                self._rm_file(f"{path}/{last}")  # from here on the folder is not a blob any more
            for found in self._system.find(path):
                self._rm_file(found)
            if self._system.isdir(path):
                with suppress(OSError):  # somebody writes into it again; an empty folder is no blob
                    self._system.rmdir(path)
        self._cache.remove(key)

    def _failing(self, error: type[RegistryError], what: str) -> AbstractContextManager[None]:
        # fsspec's backends share no base exception: botocore, gcsfs, paramiko and others pass through.
        return _failing(error, f"{self.name}: {what}", on=Exception)

    def _rm_file(self, file: str) -> None:
        with suppress(FileNotFoundError):  # gone already is what was asked for
            self._system.rm_file(file)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _upload(self, file: Path, target: str) -> None:
        folder, name = target.rsplit("/", 1)
        staged = f"{folder}/.{name}.{uuid4().hex}.tmp"
        self._system.makedirs(folder, exist_ok=True)
        try:
            self._system.put_file(str(file), staged)
            self._system.mv(staged, target)
        finally:
            if self._system.exists(staged):
                self._system.rm(staged)

    def _download(self, key: str, path: Path) -> None:
        source = self._path(key)
        with self._failing(RegistryError, f"{key} cannot be fetched"):
            if self._system.isfile(source):
                self._system.get_file(source, str(path))
                return
            path.mkdir()
            for found in self._system.ls(source, detail=False):
                name = found.rstrip("/").rsplit("/", 1)[-1]
                if not name.startswith("."):
                    self._system.get_file(found, str(path / name))


Blobs = LocalBlobs | RemoteBlobs


def _files_of(made: Path, target: str) -> list[tuple[Path, str]]:
    if made.is_file():
        return [(made, target)]
    inside = sorted(made.iterdir(), key=lambda file: (file.name in _LAST, file.name))
    return [(file, f"{target}/{file.name}") for file in inside]


@contextmanager
def _failing(error: type[RegistryError], what: str, *, on: type[Exception] = OSError) -> Iterator[None]:
    try:
        yield
    except RegistryError:
        raise
    except on as cause:
        raise error(f"{what}: {cause}") from cause


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, onerror=_unless_gone)
    else:
        path.unlink(missing_ok=True)


def _unless_gone(_: object, __: str, failure: Any) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _seal(path: Path) -> None:
    """Read-only and on the disk; temporary files are born readable by their owner alone."""
    for file in path.iterdir() if path.is_dir() else [path]:
        file.chmod(0o444)
        files.sync(file)
    files.sync(path)
