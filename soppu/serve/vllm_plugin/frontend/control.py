"""Control: what the admin routes and vLLM's adapter routes change, in the directory and in the workers."""

from __future__ import annotations

import logging
import shutil
import tempfile
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
from soppu.errors import AdapterError, BundleError
from soppu.serve.bank.resident import Figures
from soppu.serve.vllm_plugin.frontend import projecting
from soppu.serve.vllm_plugin.frontend.directory import Directory, Runtime, Version
from soppu.serve.vllm_plugin.settings import Settings

_LOG = logging.getLogger(__name__)
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
    """One server's bundles and adapters; one change at a time. Implements `soppu.serve.api.admin.Served`.

    Args:
        base_hash: of the model that is served; `base_model` is the name it was loaded by.
        reserved: names the base model is served under, which no user may have.

    Raises:
        BundleError: the bundle of the settings is damaged, or made for another base model.
    """

    def __init__(
        self, settings: Settings, *, base_hash: str, base_model: str = "", reserved: Collection[str] = ()
    ) -> None:
        self.settings, self.base, self._reserved = settings, Base(base_model, base_hash), tuple(reserved)
        self.bank = Directory(spare=settings.spare_rows)
        self._changing = threading.Lock()
        self._engine: Engine | None = None
        bundle = settings.read_bundle()
        self.first_id = bundle.bundle_id
        self._check(bundle, self.first_id)
        self.incoming = Path(tempfile.mkdtemp(prefix="soppu-"))
        self.bank.stage(bundle, self.first_id, self.bank.reserve(bundle))
        self.bank.activate(self.first_id)

    def connect(self, engine: Engine, *, reserved: Collection[str] = ()) -> None:
        """The engine that serves this; from now on changes are possible.

        Args:
            reserved: the names its base model is served under, where they differ from those given before.

        Raises:
            BundleError: its workers hold another bundle than this process read, or a user has such a name.
        """
        self._engine, self._reserved = engine, tuple(reserved) or self._reserved
        self._check_names(self.bank.versions()[self.first_id].bundle, self.first_id)
        for held in engine.call("first"):
            if held != self.first_id:
                raise BundleError(f"{self.settings.bundle}: changed while the server started; start it again")

    @property
    def model(self) -> str:
        """The name the base model is served under."""
        return self._reserved[0] if self._reserved else ""

    def close(self) -> None:
        """Remove what uploads left."""
        shutil.rmtree(self.incoming, ignore_errors=True)

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Load a bundle beside the others. False if it was there. BundleError if it does not fit."""
        with self._changing:
            if bundle_id in self.bank.bundles():
                return False
            bundle = Shelf.open(source, expected_hash=bundle_id)
            self._check(bundle, bundle_id)
            start = self.bank.reserve(bundle)
            self._connected().call("stage", str(source), bundle_id, start)
            self.bank.stage(bundle, bundle_id, start)
            return True

    def activate(self, bundle_id: str) -> str:
        """Switch plain names over; requests under way finish where they are. The one active before."""
        with self._changing:
            return self.bank.activate(bundle_id)

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
        adapter = adapters.read(folder)
        base_identity.check(adapter.base, self.base, who=name, whose="this server has")
        with self._changing:
            active = self.bank.active
            if not active:
                raise AdapterError(f"{name}: no bundle is active, so there is no basis to serve it on")
            version = self.bank.versions()[active]
            self.bank.check_name(name)
            allowed = self.settings.max_error
            if allowed is None:
                allowed = version.bundle.worst_error
            engine = self._connected()
            put = self._form(adapter, version, who=name, allowed=allowed)
            row = self.bank.free_row(active, engine.busy())
            if not row:
                raise AdapterError(
                    f"{name}: all {len(version.spare)} spare rows are taken; unload an adapter, or start the"
                    " server with a larger SOPPU_SPARE_ROWS"
                )
            path = self.incoming / "numbers.safetensors"
            files.write_bytes(path, save({key: tensor.contiguous() for key, tensor in put.tensors.items()}))
            engine.call(put.method, version.rows.start, row, *put.more, str(path))
            own = {"bundle_id": active, "error": put.error}
            self.bank.take(name, Runtime.of(adapter, self.base, where=row, **own))

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
            self.bank.remove(name)

    def _free(self, bundle_id: str, version: Version) -> None:
        engine = self._connected()
        time.sleep(_POLL_SECONDS)  # before looking: a request may be on its way into the engine
        while any(row in version.rows for row in engine.busy()):
            time.sleep(_POLL_SECONDS)
        engine.call("drop", version.rows.start)
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
            version.bundle.components(place)
            version.checked[place] = True

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
