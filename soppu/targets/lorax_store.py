"""The two places a volume can lie in: a folder of this machine, and a bucket behind fsspec."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from soppu import files
from soppu.adapter import CONFIG_FILE

_STAGING = ".staging"
_DAY = 86_400.0  # seconds after which a publication into a bucket counts as dead
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS)


class FolderStore:
    """A folder: everything is written under `.staging`, brought to the disk, then renamed into place.

    Where the file system has no hard links, every folder holds a copy of what it shares.
    """

    source = "local"
    prefix = ""
    links = True
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.name = root
        self._checked: set[str] = set()

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Be the only one who writes here; the system lets go when the holder dies. Yields True."""
        with files.exclusive(self.root / ".lock"):
            self._checked.clear()
            yield True

    def read(self, name: str) -> bytes | None:
        """A file, None if there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        files.write_bytes(self.root / name, data)

    def delete(self, name: str) -> None:
        """Delete a file; it is gone for good when this returns."""
        with suppress(FileNotFoundError):
            (self.root / name).unlink()
            files.sync((self.root / name).parent)

    def names(self, folder: str) -> list[str]:
        """The .json files of a folder."""
        return [path.name for path in (self.root / folder).glob("[!.]*.json")]

    def folders(self) -> list[str]:
        """The path of every adapter's folder."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob("adapters/*/*"))

    def sums(self, path: str) -> dict[str, str] | None:
        """File name -> SHA-256 of a folder, None if there is none. O(bytes)."""
        folder = self.root / path
        return sums_of(folder) if folder.is_dir() else None

    def put(self, path: str, content: Mapping[str, bytes], shared: Mapping[str, bytes]) -> None:
        """Make a folder of files; those in `shared` are linked to one copy below `basis`."""
        work, place = self._aside(), self.root / path
        work.mkdir()
        for name, data in content.items():
            _write(work / name, data)
        for name, data in shared.items():
            self._link(data, work / name)
        work.chmod(0o755)  # whatever the umask: the LoRAX may run as another user
        files.sync(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        work.rename(place)
        for folder in (place.parent, place.parent.parent, self.root):
            files.sync(folder)

    def remove(self, path: str) -> None:
        """Delete a folder, renamed first: half of it is never found under its name."""
        place = self.root / path
        aside = self._aside()
        with suppress(FileNotFoundError):
            place.rename(aside)
        _delete(aside)
        with suppress(OSError):  # not empty, or gone
            place.parent.rmdir()

    def drop_unused(self) -> None:
        """Delete what no adapter's folder is linked to any more."""
        for file in (self.root / "basis").glob("*"):
            if file.stat().st_nlink == 1:
                file.unlink()

    def clear(self, *, thoroughly: bool = False) -> None:
        """Delete what killed publications were writing; `thoroughly` also what they had begun elsewhere."""
        left = list((self.root / _STAGING).glob("*"))
        left += (self.root / "bundles").glob(".*.tmp") if thoroughly else ()
        for path in left:
            _delete(path)
        for path in self.root.glob("adapters/*") if thoroughly else ():
            with suppress(OSError):  # not empty
                path.rmdir()

    def _link(self, data: bytes, place: Path) -> None:
        name = hashlib.sha256(data).hexdigest()
        basis = self.root / "basis" / f"{name}.safetensors"
        if name not in self._checked:  # one that is damaged is replaced: links to it stay as they are
            if not basis.exists() or files.sha256_file(basis) != name:
                files.write_bytes(basis, data)
                basis.chmod(0o444)
            self._checked.add(name)
        try:
            os.link(basis, place)
        except OSError as error:
            if error.errno == errno.EMLINK:  # a file has only so many names: go on with another copy
                files.write_bytes(basis, data)
                basis.chmod(0o444)
                os.link(basis, place)
            elif error.errno in _NO_LINKS:
                _write(place, data)
            else:
                raise

    def _aside(self) -> Path:
        (self.root / _STAGING).mkdir(exist_ok=True)
        return self.root / _STAGING / uuid.uuid4().hex


class BucketStore:
    """A prefix of a bucket: an object appears whole, a folder of them once its configuration is there.

    There are no links and no locks. Who publishes says so in an object of its own for as long as it takes,
    and nothing is deleted meanwhile.
    """

    source = "s3"
    links = False
    errors: tuple[type[Exception], ...] = (Exception,)  # fsspec's backends share no base exception

    def __init__(self, system: Any, root: str, *, name: str) -> None:
        self._system, self._root, self.name = system, root.rstrip("/"), name
        self.prefix = f"{self._root.lstrip('/')}/"

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Say that somebody writes here; yields whether nobody else does."""
        self._system.invalidate_cache()
        begun = self.names(_STAGING)
        own = f"{_STAGING}/{uuid.uuid4().hex}.json"
        self.write(own, json.dumps(time.time()).encode())
        try:
            yield all(map(self._is_dead, begun))
        finally:
            self.delete(own)

    def read(self, name: str) -> bytes | None:
        """An object, None if there is none."""
        try:
            return bytes(self._system.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        self._system.pipe_file(f"{self._root}/{name}", data)

    def delete(self, name: str) -> None:
        """Delete an object; gone already is what was asked for."""
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{name}")

    def names(self, folder: str) -> list[str]:
        """The .json objects of a folder."""
        return [name for name in self._below(folder) if name.endswith(".json")]

    def folders(self) -> list[str]:
        """The path of every adapter's folder."""
        return sorted({f"adapters/{name.rpartition('/')[0]}" for name in self._below("adapters")})

    def sums(self, path: str) -> dict[str, str] | None:
        """File name -> SHA-256 of a folder, None if it is not there whole. O(bytes)."""
        found = {name: self.read(f"{path}/{name}") or b"" for name in self._below(path)}
        if CONFIG_FILE not in found:
            return None
        return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}

    def put(self, path: str, content: Mapping[str, bytes], shared: Mapping[str, bytes]) -> None:
        """Write the objects of a folder, its configuration last."""
        for name in sorted({**content, **shared}, key=lambda name: name == CONFIG_FILE):
            self.write(f"{path}/{name}", {**content, **shared}[name])

    def remove(self, path: str) -> None:
        """Delete the objects of a folder, its configuration first: half a folder does not count as one."""
        for name in sorted(self._below(path), key=lambda name: name != CONFIG_FILE):
            self.delete(f"{path}/{name}")

    def drop_unused(self) -> None:
        """Nothing is shared here."""

    def clear(self, *, thoroughly: bool = False) -> None:
        """Delete what publications that died long ago have said of themselves."""
        for name in filter(self._is_dead, self.names(_STAGING)) if thoroughly else ():
            self.delete(f"{_STAGING}/{name}")

    def _is_dead(self, name: str) -> bool:
        """Whether the publication that wrote this object began so long ago that it cannot be under way."""
        return time.time() - json.loads(self.read(f"{_STAGING}/{name}") or b"0") > _DAY

    def _below(self, folder: str) -> list[str]:
        self._system.invalidate_cache()
        place = f"{self._root}/{folder}/"
        with suppress(FileNotFoundError):
            return [path.removeprefix(place) for path in self._system.find(place)]
        return []


def sums_of(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of what is in a folder. O(bytes)."""
    # what starts with a dot is nobody's adapter: network file systems and desktops leave such files
    return {file.name: files.sha256_file(file) for file in folder.glob("[!.]*")}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    path.chmod(0o444)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
