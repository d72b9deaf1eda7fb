"""ServerState: what one server holds, in memory and on disk in step, so that a restart serves the same.

    <root>/state.json                       base hash, active bundle, bundles, adapters
    <root>/bundles/<bundle id>.safetensors, and its index, see `compress.bundle.index`
    <root>/adapters/<name hash>-<content hash>/      a PEFT folder
    <root>/incoming/                        uploads under way
    <root>/joined/                          who joined here, see `newcomers`
    <root>/lock                             held while a server runs

Which request gets which adapter is decided in `soppu.serve.bank.bank`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from soppu import adapter as adapters
from soppu import files
from soppu.compress.bundle.index import path_of
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.bundle.stored import StoredFile
from soppu.errors import AdapterError, BundleError, RequestError, StorageError, TargetError
from soppu.published import bundle_key
from soppu.serve.bank.bank import AdapterBank, Ticket
from soppu.serve.bank.holdings import Holdings, LoadedAdapter
from soppu.serve.layers.factors import Slot
from soppu.serve.names import adapter_folder, check_name, check_servable

_LOG = logging.getLogger(__name__)
_SHORT = 256  # characters that any name may have
_BUNDLE, _ADAPTER = r"[0-9a-f]{64}\.safetensors(\.index)?", r"[0-9a-f]{16}-[0-9a-f]{16}"
# Folder -> the names a server gives there, and those of writes under way.
_OWN = {
    "bundles": re.compile(rf"{_BUNDLE}|\.{_BUNDLE}\.\w+\.tmp"),
    "adapters": re.compile(_ADAPTER),
    ".": re.compile(r"\.(state\.json|admin-token)\.\w+\.tmp"),
}


class _Remembered(BaseModel, strict=True):
    """What `state.json` holds."""

    active: str
    adapters: dict[str, str]  # name -> folder
    base_hash: str
    bundles: list[str]
    format: Literal[1]


class ServerState:
    """What one server holds. Every change reaches the disk before it is answered; one change at a time."""

    def __init__(self, root: Path, bank: AdapterBank) -> None:
        self.bank = bank
        self.incoming = root / "incoming"
        self.newcomers = root / "joined"
        self._root = root
        self._lock = ExitStack()
        self._changing = threading.Lock()

    @classmethod
    def open(cls, root: Path, bank: AdapterBank) -> ServerState:
        """Take the folder for this process and load what it remembers into `bank`.

        Raises:
            TargetError: another server uses the folder, or it belongs to another base model.
            BundleError: a stored bundle is damaged.
            AdapterError: a stored adapter is damaged.
            StorageError: what an earlier server left there cannot be removed.
        """
        state = cls(root, bank)
        with ExitStack() as lock:
            try:
                lock.enter_context(files.exclusive(root / "lock", wait=False))
            except BlockingIOError:
                raise TargetError(f"{root}: another server uses this state folder") from None
            state._restore()
            state._sweep()
            state.incoming.mkdir()
            bank.commit = state._write
            state._lock = lock.pop_all()
        return state

    def close(self) -> None:
        """Give the folder back; changes of the bank are no longer written."""
        self.bank.commit = None
        self._lock.close()

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Copy a bundle file in and stage it. False if it was there already.

        Raises:
            BundleError: the file is not what `bundle_id` names, is damaged, does not fit the model, or has a
                user whose name no request may carry.
            StorageError: the disk refused it. Nothing is staged then.
        """
        with self._changing:
            if bundle_id in self.bank.bundles():
                return False
            self._take(source, expected=bundle_id)
            return True

    def add_file(self, source: Path) -> str:
        """As `add_bundle` for a file whose id is not known; the id.

        A file of the size and header of one that was copied in is that one, as the header holds a digest of
        all the rest: a start does not read it again.
        """
        with self._changing:
            if source.is_fifo():  # it comes once, and says nothing of itself before
                return self._take(source, expected="")
            found = StoredFile(source)
            for bundle_id in self.bank.bundles():
                held = StoredFile(self.bundle_path(bundle_id))
                if held.size == found.size and held.head() == found.head():
                    return bundle_id
            return self._take(source, expected="")

    def _take(self, source: Path, *, expected: str) -> str:
        """Copy a file beside the others, check it there, stage it, and give it its name. O(size)."""
        incoming = self.incoming / "bundle.safetensors"
        moved: list[Path] = []
        try:
            with files.atomic_path(incoming) as temporary:
                _copy(source, temporary)
            shelf = Shelf.open(incoming, expected_hash=expected)
            if shelf.bundle_id in self.bank.bundles():
                return shelf.bundle_id
            _check_users(shelf.users)
            path = self.bundle_path(shelf.bundle_id)
            moved = [path, path_of(path)]
            _rename({incoming: path, path_of(incoming): path_of(path)})
            self.bank.stage(shelf, bundle_id=shelf.bundle_id)
        except (BundleError, StorageError):
            for path in moved:
                path.unlink(missing_ok=True)
            raise
        finally:
            for path in (incoming, path_of(incoming)):
                path.unlink(missing_ok=True)
        return shelf.bundle_id

    def activate(self, bundle_id: str, *, instead_of: str | None = None) -> str:
        """Make a staged bundle active ("" for none); return the one that was. BundleError, StorageError.

        RequestError 409 where another one is active than `instead_of`, if that is given.
        """
        with self._changing:
            self.bank.check_active(instead_of)
            return self.bank.activate(bundle_id)

    def drop_bundle(self, bundle_id: str) -> None:
        """Forget a bundle and delete its file.

        Raises:
            BundleError: it is active, or not there.
            StorageError: the disk refused it. The bundle is still served then.
        """
        with self._changing:
            self.bank.drop(bundle_id)
            path = self.bundle_path(bundle_id)
            for place in (path, path_of(path)):
                place.unlink(missing_ok=True)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under `name` and keep a copy; one of that name is replaced.

        Raises:
            AdapterError: the folder is malformed, or does not fit the model.
            RequestError: 422, nobody could ask for that name.
            StorageError: the disk refused it.
        """
        check_servable(name, self.bank.bundles())
        adapter = adapters.read(folder)
        path = self._adapter_path(name, adapter.content_hash())
        with self._changing:
            old = self.bank.adapters().get(name)
            if old is not None and old.content_hash == adapter.content_hash():
                return
            try:
                adapters.write(adapter, path)
                self.bank.add(name, adapter)
            except (AdapterError, StorageError):
                shutil.rmtree(path, ignore_errors=True)
                raise
            if old is not None:
                shutil.rmtree(self._adapter_path(name, old.content_hash))

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter and delete its copy.

        Raises:
            AdapterError: there is none of that name.
            StorageError: the disk refused it. The adapter is still served then.
        """
        with self._changing:
            loaded = self.bank.adapters().get(name)
            self.bank.remove(name)
            assert loaded is not None  # else refused
            shutil.rmtree(self._adapter_path(name, loaded.content_hash))

    def bundle_path(self, bundle_id: str) -> Path:
        """Where a bundle's file lies."""
        return self._root / bundle_key(bundle_id)

    def _adapter_path(self, name: str, content_hash: str) -> Path:
        return self._root / "adapters" / adapter_folder(name, content_hash)

    def _write(self, held: Holdings[Slot | Ticket, LoadedAdapter]) -> None:
        """Have the disk remember what is about to be served. StorageError."""
        folders = {name: self._adapter_path(name, a.content_hash).name for name, a in held.adapters.items()}
        content = _Remembered(
            active=held.active,
            adapters=folders,
            base_hash=self.bank.base.hash,
            bundles=sorted(held.bundles),
            format=1,
        )
        files.write_text(self._root / "state.json", content.model_dump_json(indent=2))

    def _sweep(self) -> None:
        """Remove what no state names: uploads, and writes, that a server was killed at. StorageError.

        Only what a server calls so is touched: the folder may hold logs, and a person's own.
        """
        held = self.bank.bundles(), self.bank.adapters()
        kept = {self.bundle_path(bundle_id) for bundle_id in held[0]}
        kept |= {path_of(path) for path in kept}
        kept |= {self._adapter_path(name, adapter.content_hash) for name, adapter in held[1].items()}
        left = [
            path
            for folder, own in _OWN.items()
            for path in (self._root / folder).glob("*")
            if path not in kept and own.fullmatch(path.name)
        ]
        try:
            for path in [*left, self.incoming]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            why = f"{error.filename}: what a killed server left cannot be removed: {error.strerror}"
            raise StorageError(why) from error
        if left:
            _LOG.warning("%s: removed what a killed server left: %d files and folders", self._root, len(left))

    def _restore(self) -> None:
        path = self._root / "state.json"
        if not path.exists():
            return
        try:
            content = _Remembered.model_validate_json(path.read_bytes())
        except ValidationError:
            raise TargetError(
                f"{path}: not a server state of format 1; move it away to start empty"
            ) from None
        if content.base_hash != self.bank.base.hash:
            raise TargetError(
                f"{self._root}: holds adapters of base model {content.base_hash[:12]},"
                f" this server has {self.bank.base.hash[:12]}; give it a state folder of its own"
            )
        for bundle_id in content.bundles:
            shelf = Shelf.open(self.bundle_path(bundle_id), expected_hash=bundle_id)
            self.bank.stage(shelf, bundle_id=bundle_id)
        self.bank.activate(content.active)
        for name, key in content.adapters.items():
            adapter = adapters.read(self._root / "adapters" / key)
            if (expected := self._adapter_path(name, adapter.content_hash()).name) != key:
                raise AdapterError(
                    f"{self._root / 'adapters' / key}: holds adapter {expected}, not the one that was put as"
                    f" {name!r}; move the state folder away to start empty"
                )
            self.bank.add(name, adapter)


def _copy(source: Path, target: Path) -> None:
    if not source.is_fifo():
        shutil.copyfile(source, target)
        return
    with source.open("rb") as stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out)


def _rename(places: dict[Path, Path]) -> None:
    """Give files their places in another folder of the same disk. StorageError."""
    try:
        for source, path in places.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if source.exists():  # an index that could not be written is none
                os.replace(source, path)
                files.sync(path.parent)
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be put in its place: {error.strerror}") from error


def _check_users(users: Iterable[str]) -> None:
    """BundleError where a user could never be asked for."""
    for user in users:
        if user.isascii() and user.isprintable() and len(user) <= _SHORT:
            continue  # most names, in a tenth of the time
        try:
            check_name(user, what="user")
        except RequestError as error:
            raise BundleError(f"user {user[:80]!r} cannot be asked for: {error}") from None
