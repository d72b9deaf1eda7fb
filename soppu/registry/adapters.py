"""The adapters of one registry: their files, who is given them, and their removal once nobody holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sqlalchemy as sa

from soppu.adapter import LoraAdapter
from soppu.blobs import Blobs
from soppu.cores.core import CoreAdapter
from soppu.errors import RegistryError
from soppu.registry import forms, ledger
from soppu.registry.catalogue import Adapter, Catalogue, Holding
from soppu.registry.forms import CORE, Form


class Adapters:
    """What `Registry` keeps of adapters, for any number of threads and processes."""

    def __init__(self, blobs: Blobs, catalogue: Catalogue) -> None:
        self._blobs = blobs
        self._catalogue = catalogue

    def put(self, form: Form, holding: Holding) -> None:
        """Store an adapter, and make it the current one of the holding's user. As `Registry.put_adapter`."""
        put = partial(self._blobs.put, _key(form.id), form.write, form.check)
        removals = self._put_unlocked(form.id, put)
        with self._catalogue.write() as session:
            owner = ledger.claim_user(session, holding.user_id)
            row = ledger.claim_adapter(session, form)
            if row.state != "stored" and row.removals != removals:
                # A deletion crossed the write above. None can while the row is locked: clear and write again.
                self._blobs.remove(_key(form.id))
                row.removals += 1
            if not self._blobs.has(_key(form.id)):
                put()
            row.state = "stored"
            ledger.hold(session, owner, holding)

    def pairs(self, row: Adapter) -> LoraAdapter:
        """The adapter of a row that is stored as pairs. RegistryError if it is damaged."""
        return self._blobs.fetch(_key(row.id), partial(forms.read_pairs, row.id, row.content))

    def core(self, row: Adapter) -> CoreAdapter:
        """The core of a row. RegistryError if it is damaged, or stored as pairs."""
        if row.kind != CORE:
            raise RegistryError(f"adapter {row.id} is no core: it is stored as pairs; get_adapter reads it")
        return self._blobs.fetch(_key(row.id), partial(forms.read_core, row.id, row.content))

    def size(self, row: Adapter) -> int:
        """Bytes of the safetensors file. RegistryError if it cannot be read."""
        return self._blobs.size(f"{_key(row.id)}/{forms.WEIGHTS[row.kind]}")

    def stored(self, adapter_id: str) -> Adapter:
        """The row of an adapter that is there. RegistryError if it is unknown or forgotten."""
        with self._catalogue.read() as session:
            row = session.get(Adapter, adapter_id)
        if row is None:
            raise RegistryError(f"unknown adapter {adapter_id!r}")
        if row.state != "stored":
            raise RegistryError(f"adapter {adapter_id} was forgotten with its user")
        return row

    def remove_unheld(self) -> tuple[str, ...]:
        """Delete the blobs of adapters that nobody holds any more; the ids of those that were."""
        query = sa.select(Adapter.id).where(Adapter.state == "removing").order_by(Adapter.id)
        with self._catalogue.read() as session:
            waiting = session.scalars(query).all()
        return tuple(adapter_id for adapter_id in waiting if self._remove(adapter_id))

    def _put_unlocked(self, adapter_id: str, put: Callable[[], None]) -> int:
        """Write an adapter's blob, the slow part, without a lock; how often it was deleted before."""
        with self._catalogue.read() as session:
            before = ledger.removals(session, adapter_id)
        try:
            put()
        except RegistryError:
            with self._catalogue.write() as session:
                if ledger.removals(session, adapter_id, lock=True) == before:
                    raise
            # It failed because somebody forgot this very adapter meanwhile: the count tells the caller.
        return before

    def _remove(self, adapter_id: str) -> bool:
        """Delete the blob of an adapter that nobody holds; True if that was due."""
        with self._catalogue.write() as session:
            row = session.get(Adapter, adapter_id, with_for_update=True)
            if row is None or row.state == "stored":  # somebody has put it meanwhile
                return False
            self._blobs.remove(_key(adapter_id))
            due = row.state == "removing"
            row.state, row.removals = "removed", row.removals + 1
            return due


def _key(adapter_id: str) -> str:
    return f"adapters/{adapter_id}"
