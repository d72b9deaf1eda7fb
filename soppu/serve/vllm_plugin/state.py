"""State: what one vLLM server serves, in a folder, so that after kill -9 it serves the same.

    <SOPPU_STATE>/<n>/state.json                     active, previous and staged bundles, runtime adapters
    <SOPPU_STATE>/<n>/starting.json                  the same, as a start means it: state.json once it is up
    <SOPPU_STATE>/<n>/bundles/<bundle id>.safetensors
    <SOPPU_STATE>/<n>/adapters/<name hash>-<content hash>/      a PEFT folder
    <SOPPU_STATE>/<n>/incoming/                      uploads under way
    <SOPPU_STATE>/<n>/lock                           held while a server runs

Servers of one machine may share a SOPPU_STATE: each takes the first <n> that is free. The API server writes;
the workers read which bundles there are, and their order, which gives each its rows.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from soppu import files, published
from soppu.blobs import open_blobs
from soppu.compress.bundle.index import path_of
from soppu.compress.bundle.shelf import Shelf
from soppu.errors import BundleError, ConfigError, RegistryError, StorageError
from soppu.serve.vllm_plugin.settings import Settings

_LOG = logging.getLogger("vllm.soppu")  # only loggers below "vllm" are shown
_TAKEN = "SOPPU_STATE_TAKEN"  # how the workers, who inherit the environment, learn which folder it is
_STATE, _STARTING = "state.json", "starting.json"
_MOST = 64  # servers that share a folder


class Adapter(BaseModel, strict=True, frozen=True):
    """A runtime adapter: its folder in `adapters`, and the bundle whose basis it is on."""

    folder: str
    bundle_id: str


class Content(BaseModel, strict=True, frozen=True):
    """What `state.json` holds."""

    format: Literal[1] = 1
    base_hash: str
    begun: str  # the bundle that SOPPU_BUNDLE meant at the last start
    active: str
    previous: str = ""  # what was active before, "" where it is gone
    bundles: tuple[str, ...]  # all of them, in the order of their rows
    adapters: dict[str, Adapter] = {}
    followed: str = ""  # the publication that was taken over last, `Pointer.mark`


class State:
    """The folder of one server; for the process that holds its lock."""

    def __init__(self, folder: Path, content: Content, lock: ExitStack) -> None:
        self.folder, self.content, self._lock = folder, content, lock
        self.incoming = folder / "incoming"

    @classmethod
    def begin(cls, settings: Settings, base_hash: str) -> State:
        """Take a folder, and decide what is served: what was, or another bundle that the settings name now.

        Raises:
            BundleError: a bundle kept there is damaged, or belongs to another base model.
            RegistryError: the settings name a registry that cannot be read, and nothing is kept.
            ConfigError: it holds no publication, or the folder is no state of ours.
            StorageError: the disk refused it.
        """
        folder, lock = _take(settings.state)
        with lock:
            kept = _read(folder / _STATE)
            if kept is not None and kept.base_hash != base_hash:
                raise BundleError(
                    f"{folder}: holds bundles of base model {kept.base_hash[:12]}, this server has"
                    f" {base_hash[:12]}; set SOPPU_STATE to a folder of its own"
                )
            found = _first(settings, kept)
            state = cls(folder, _decided(kept, found, base_hash), lock)
            if found is not None and found[1] in state.content.bundles:
                state.keep(found[0], found[1])
            _write(folder / _STARTING, state.content)
            state._sweep()
            state._lock = lock.pop_all()
        os.environ[_TAKEN] = str(folder)
        return state

    def write(self, content: Content) -> None:
        """Remember this from now on. StorageError if the disk refuses it; nothing has changed then."""
        _write(self.folder / _STATE, content)
        self.content = content

    def path(self, bundle_id: str) -> Path:
        """Where a bundle's file lies."""
        return _path(self.folder, bundle_id)

    def keep(self, source: Path, bundle_id: str) -> Path:
        """A bundle's file in the folder, a link to the source where that can be. StorageError."""
        path = self.path(bundle_id)
        for one, place in (
            (path_of(source), path_of(path)),
            (source, path),
        ):  # an index spares reading it whole
            if not place.exists() and (one.exists() or one == source):
                _link(one, place)
        return path

    def forget(self, bundle_id: str) -> None:
        """Remove a bundle's file."""
        path = self.path(bundle_id)
        for place in (path, path_of(path)):
            place.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the folder back."""
        shutil.rmtree(self.incoming, ignore_errors=True)
        self._lock.close()

    def _sweep(self) -> None:
        """Remove what nobody remembers: uploads, bundles and adapters that a server was killed at."""
        kept = {self.path(bundle_id) for bundle_id in self.content.bundles}
        kept |= {path_of(path) for path in kept}
        kept |= {self.folder / "adapters" / one.folder for one in self.content.adapters.values()}
        for path in [*self.folder.glob("bundles/*"), *self.folder.glob("adapters/*"), self.incoming]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.incoming.mkdir()


def kept_bundles(folder: Path | None = None) -> list[Shelf]:
    """Every bundle of the server whose folder this process inherited, in the order of rows.

    Raises:
        BundleError: one is damaged; or no server began here.
    """
    folder = folder or Path(os.environ.get(_TAKEN, ""))
    content = _read(folder / _STARTING)
    if content is None:
        raise BundleError(f"{folder}: no {_STARTING}; the API server has to run on this machine, or share it")
    return [Shelf.open(_path(folder, one), expected_hash=one) for one in content.bundles]


def _take(root: Path) -> tuple[Path, ExitStack]:
    """The first folder below `root` that no running server holds, and its lock."""
    for number in range(_MOST):
        lock = ExitStack()
        try:
            lock.enter_context(files.exclusive(root / str(number) / "lock", wait=False))
        except BlockingIOError:
            continue
        except OSError as error:
            raise StorageError(f"{root}: cannot keep state here: {error}; set SOPPU_STATE") from error
        return root / str(number), lock
    raise ConfigError(f"{root}: {_MOST} servers hold a state here already; set SOPPU_STATE to another folder")


def _link(source: Path, path: Path) -> None:
    """A file in another place, the same one where that can be. StorageError."""
    mode = source.stat().st_mode & 0o777  # a link shares it with its source
    with files.atomic_path(path, mode=mode) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)


def _path(folder: Path, bundle_id: str) -> Path:
    return folder / published.bundle_key(bundle_id)


def _write(path: Path, content: Content) -> None:
    files.write_text(path, content.model_dump_json(indent=2))


def _read(path: Path) -> Content | None:
    """What is remembered; None where nothing is, or no bundle."""
    if not path.exists():
        return None
    try:
        content = Content.model_validate_json(path.read_bytes())
    except ValidationError:
        raise ConfigError(
            f"{path}: not a server state of format 1; move it away to start with SOPPU_BUNDLE alone"
        ) from None
    return content if content.bundles else None


def _first(settings: Settings, kept: Content | None) -> tuple[Path, str, str] | None:
    """The file, id and publication (`Pointer.mark`) that the settings name; None: what is kept is all."""
    if isinstance(settings.bundle, Path):
        return settings.bundle, Shelf.open(settings.bundle).bundle_id, ""
    url = settings.follow_url if settings.follow == settings.bundle else ""
    try:
        blobs = open_blobs(settings.bundle)
        pointer = published.newest(blobs, url)
        if pointer is None:
            to = f" to {url}" if url else ""
            raise ConfigError(f"SOPPU_BUNDLE: nothing was published{to} in registry {blobs.name} yet")
        return published.bundle_path(blobs, pointer.bundle_id), pointer.bundle_id, pointer.mark
    except RegistryError as error:
        if kept is None:
            raise
        _LOG.warning("%s; starting with what was served here before", error)
        return None


def _decided(kept: Content | None, found: tuple[Path, str, str] | None, base_hash: str) -> Content:
    """What is served: what was, unless the settings mean another bundle than at the last start."""
    if found is None:
        assert kept is not None
        return kept
    _, first, mark = found
    if kept is None:
        return Content(base_hash=base_hash, begun=first, active=first, bundles=(first,), followed=mark)
    if mark == kept.followed if mark else first == kept.begun:
        return kept
    others = tuple(one for one in kept.bundles if one != first)
    before = kept.previous if kept.active == first else kept.active
    changes = {"begun": first, "active": first, "previous": before, "bundles": (*others, first)}
    return kept.model_copy(update={**changes, "followed": mark or kept.followed})
