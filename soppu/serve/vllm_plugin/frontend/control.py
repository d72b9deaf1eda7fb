"""Control: what the admin routes and vLLM's adapter routes change, in the directory and in the workers."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from soppu import adapter as adapters
from soppu import base_identity, files
from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.compress.bundle.shelf import Shelf
from soppu.errors import AdapterError, BundleError, SoppuError, StorageError
from soppu.published import Pointer
from soppu.serve.bank.holdings import Holdings
from soppu.serve.bank.resident import Figures
from soppu.serve.names import adapter_folder
from soppu.serve.vllm_plugin.frontend import projecting
from soppu.serve.vllm_plugin.frontend.directory import Directory, Runtime, Version
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.state import Adapter as Kept
from soppu.serve.vllm_plugin.state import State, kept_bundles

_LOG = logging.getLogger("vllm.soppu")  # only loggers below "vllm" are shown
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Engine:
    """What is needed of the running engine."""

    call: Callable[..., Any]  # (method of `worker.Worker`, its arguments), on each; blocks. BundleError
    busy: Callable[[], Collection[int]]  # the rows that requests are on


@dataclass(frozen=True, eq=False)
class _Put:
    """A runtime adapter on its way to the workers: their method, its tensors and further arguments."""

    method: str
    tensors: Mapping[str, Tensor]
    error: float
    more: tuple[int, ...] = ()


class Control:
    """One server's bundles and adapters; one change at a time. Implements `soppu.serve.bank.served.Served`.

    Args:
        base_hash: of the model that is served; `base_model` is the name it was loaded by.
        reserved: names the base model is served under, which no user may have.

    Raises:
        BundleError: a bundle is damaged, or made for another base model.
        ConfigError, RegistryError, StorageError: see `State.begin`.
    """

    def __init__(
        self, settings: Settings, *, base_hash: str, base_model: str = "", reserved: Collection[str] = ()
    ) -> None:
        self.settings, self.base, self._reserved = settings, Base(base_model, base_hash), tuple(reserved)
        self.bank = Directory(spare=settings.spare_rows)
        self.bank.bases = self._reserved
        self._changing = threading.Lock()
        self._engine: Engine | None = None
        self.state = State.begin(settings, base_hash)
        try:
            for bundle in kept_bundles(self.state.folder):
                self._check(bundle, bundle.bundle_id)
                self.bank.stage(bundle, bundle.bundle_id, self.bank.reserve(bundle))
            self.bank.activate(self.state.content.active)
        except SoppuError:
            self.state.close()
            raise
        self.lost = dict[str, str]()  # adapters loaded before a restart that are not served now, and why
        self._mark = self.state.content.followed
        self._followed = set(self.state.content.bundles) if settings.follow else set[str]()

    def connect(self, engine: Engine, *, reserved: Collection[str] = ()) -> None:
        """The engine that serves this; from now on changes are possible.

        Args:
            reserved: the names its base model is served under, where they differ from those given before.

        Raises:
            BundleError: its workers hold another bundle than this process read, or a user has such a name.
        """
        self._engine, self._reserved = engine, tuple(reserved) or self._reserved
        self.bank.bases = self._reserved
        versions = self.bank.versions()
        for bundle_id, version in versions.items():
            self._check_names(version.bundle, bundle_id)
        wanted = [(bundle_id, version.rows.start) for bundle_id, version in versions.items()]
        for began in engine.call("began"):
            if [tuple(one) for one in began] != wanted:
                raise BundleError(f"{self.state.folder}: changed while the server started; start it again")
        for name, kept in self.state.content.adapters.items():
            try:
                self._serve(name, self.state.folder / "adapters" / kept.folder, kept.bundle_id)
            except (AdapterError, BundleError) as error:
                self.lost[name] = str(error)
                _LOG.error("adapter %r, loaded before the restart, is not served: %s", name, error)
        self.bank.commit = self._remember
        self.bank.activate(self.bank.active)  # to have it remembered: nothing has refused this start
        if self.settings.read_ahead:
            engine.call("read_ahead")  # not before: nobody may take memory while passes are recorded

    @property
    def model(self) -> str:
        """The name the base model is served under."""
        return self._reserved[0] if self._reserved else ""

    def close(self) -> None:
        """Give the state back to the next server."""
        self.bank.commit = None
        self.state.close()

    @property
    def incoming(self) -> Path:
        """A folder for uploads under way."""
        return self.state.incoming

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Load a bundle beside the others. False if it was there. BundleError if it does not fit."""
        with self._changing:
            if bundle_id in self.bank.bundles():
                return False
            path = self.state.keep(source, bundle_id)
            try:
                bundle = Shelf.open(path, expected_hash=bundle_id)
                self._check(bundle, bundle_id)
                start = self.bank.reserve(bundle)
                self._connected().call("stage", str(path), bundle_id, start)
                self._stage(bundle, bundle_id, start)
            except SoppuError:
                self.state.forget(bundle_id)
                raise
            return True

    def _stage(self, bundle: Shelf, bundle_id: str, start: int) -> None:
        try:
            self.bank.stage(bundle, bundle_id, start)
        except StorageError:
            self._connected().call("drop", start)
            raise

    @property
    def newcomers(self) -> Path:
        """A folder of the state, for who joins here."""
        return self.state.folder / "joined"

    def bundle_path(self, bundle_id: str) -> Path:
        """Where a bundle's file lies."""
        return self.state.path(bundle_id)

    def activate(self, bundle_id: str, *, instead_of: str | None = None) -> str:
        """Switch plain names over; requests under way finish where they are. The one active before.

        RequestError 409 where another one is active than `instead_of`, if that is given.
        """
        with self._changing:
            self.bank.check_active(instead_of)
            return self.bank.activate(bundle_id)

    def follow(self, source: Path, *, pointer: Pointer) -> None:
        """Make what a registry publishes active here, and drop what was followed before the last.

        Raises:
            BundleError: it does not fit this server, which goes on as it was.
            StorageError: the disk refused it.
        """
        new, before = self.add_bundle(source, bundle_id=pointer.bundle_id), self.bank.active
        with self._changing:
            old, self._mark = self._mark, pointer.mark
            try:
                self.bank.activate(pointer.bundle_id)
            except SoppuError:
                self._mark = old
                raise
        _LOG.info("bundle %s: published, and active now", pointer.bundle_id[:12])
        if new:
            self._followed.add(pointer.bundle_id)
        for bundle_id in self._followed - {pointer.bundle_id, before, self.state.content.previous}:
            try:
                self.drop_bundle(bundle_id)
            except BundleError as error:  # gone already, or an adapter is on its basis: then the next time
                _LOG.info("%s", error)
        self._followed &= self.bank.bundles().keys()

    @property
    def followed(self) -> str:
        """The publication that was taken over last, `Pointer.mark`; "" for none."""
        return self._mark

    def drop_bundle(self, bundle_id: str) -> None:
        """Forget a bundle at once; its memory is freed when the last request on it has finished."""
        with self._changing:
            version = self.bank.retire(bundle_id)
        threading.Thread(target=self._free, args=(bundle_id, version), daemon=True).start()

    def add_adapter(self, name: str, folder: Path) -> None:
        """Serve a PEFT folder on the active bundle's basis, under `name`; one of that name is replaced.

        What the basis does not hold is kept as 8-bit numbers of its own, if the bundle's users have some.

        Raises:
            AdapterError: malformed, of another base model, above the error that is allowed, a user's name, or
                no spare row is left.
        """
        active = self.bank.active
        if not active:
            raise AdapterError(f"{name}: no bundle is active, so there is no basis to serve it on")
        self._serve(name, folder, active)

    def _serve(self, name: str, folder: Path, on: str) -> None:
        """`add_adapter` on the basis of the bundle `on`."""
        adapter = adapters.read(folder)
        base_identity.check(adapter.base, self.base, who=name, whose="this server has")
        kept = self.state.folder / "adapters" / adapter_folder(name, adapter.content_hash())
        with self._changing:
            version = self.bank.versions().get(on)
            if version is None:
                raise AdapterError(f"{name}: bundle {on[:12]}, on whose basis it is, is not loaded any more")
            self.bank.check_name(name)
            allowed = self.settings.max_error
            if allowed is None:
                allowed = version.bundle.worst_error
            engine = self._connected()
            put = self._form(adapter, version, who=name, allowed=allowed)
            row = self.bank.free_row(on, engine.busy())
            if not row:
                raise AdapterError(
                    f"{name}: all {len(version.spare)} spare rows are taken; unload an adapter, or start the"
                    " server with a larger SOPPU_SPARE_ROWS"
                )
            path = self.incoming / "numbers.safetensors"
            files.write_bytes(path, save({key: tensor.contiguous() for key, tensor in put.tensors.items()}))
            engine.call(put.method, version.rows.start, row, *put.more, str(path))
            self.state.keep_adapter(folder, kept.name)
            was = self.bank.adapters().get(name)
            own = {"bundle_id": on, "error": put.error, "folder": kept.name}
            self.bank.take(name, Runtime.of(adapter, self.base, where=row, **own))
            self.lost.pop(name, None)
            if was is not None and was.folder != kept.name:
                shutil.rmtree(self.state.folder / "adapters" / was.folder, ignore_errors=True)

    def _form(self, adapter: LoraAdapter, version: Version, *, who: str, allowed: float) -> _Put:
        projected = projecting.project(adapter, version.bundle, who=who)
        if projected.error <= allowed:
            return _Put("put", projected.cores, projected.error, (projected.cluster,))
        if all(self._connected().call("keeps_own", version.rows.start)):
            own = projecting.integers(adapter)
            if own.error <= allowed:
                return _Put("put_own", own.tensors, own.error)
        raise projecting.refusal(who, projected.error, allowed)

    def drop_adapter(self, name: str) -> None:
        """Forget a runtime adapter. AdapterError if there is none of that name."""
        with self._changing:
            kept = self.bank.adapters().get(name)
            self.bank.remove(name)
            if kept is not None:
                shutil.rmtree(self.state.folder / "adapters" / kept.folder, ignore_errors=True)

    def _remember(self, held: Holdings[int, Runtime]) -> None:
        """Have the disk know what is about to be served. StorageError."""
        was = self.state.content
        previous = was.previous if held.active == was.active else was.active
        changes = {
            "active": held.active,
            "previous": previous if previous in held.bundles else "",
            "bundles": tuple(held.bundles),
            "adapters": {
                name: Kept(folder=one.folder, bundle_id=one.bundle_id) for name, one in held.adapters.items()
            },
            "followed": self._mark,
        }
        self.state.write(was.model_copy(update=changes))

    def _free(self, bundle_id: str, version: Version) -> None:
        engine = self._connected()
        time.sleep(_POLL_SECONDS)  # before looking: a request may be on its way into the engine
        while any(row in version.rows for row in engine.busy()):
            time.sleep(_POLL_SECONDS)
        engine.call("drop", version.rows.start)
        with self._changing:
            if bundle_id not in self.bank.bundles():  # staged again meanwhile, from the same file
                self.state.forget(bundle_id)
        _LOG.info("bundle %s: freed", bundle_id[:12])

    def unchecked(self, name: str) -> bool:
        """Whether `check_user` has something to do."""
        return self.bank.unchecked(name) is not None

    def check_user(self, name: str) -> None:
        """Decode a user's page before the first request is let into the engine, which an error would end.

        Raises:
            BundleError: it is damaged; the message names user and page.
        """
        if (found := self.bank.unchecked(name)) is not None:
            version, place = found
            sound = version.bundle.check(place)
            version.checked[sound.start : sound.stop] = True

    def figures(self) -> Figures:
        """Who is in the workers' memory; each of them has the same."""
        return Figures(**self._connected().call("figures")[0])

    def _connected(self) -> Engine:
        if self._engine is None:
            raise BundleError("the engine is not up yet")
        return self._engine

    def _check(self, bundle: Shelf, bundle_id: str) -> None:
        who = f"bundle {bundle_id[:12]}"
        base_identity.check(bundle.base, self.base, who=who, whose="this server has", error=BundleError)
        self._check_names(bundle, bundle_id)

    def _check_names(self, bundle: Shelf, bundle_id: str) -> None:
        if clash := sorted(name for name in self._reserved if name in bundle.users):
            raise BundleError(
                f"bundle {bundle_id[:12]}: user {clash[0]!r} has the name the base model is served under;"
                " choose another one with --served-model-name"
            )
