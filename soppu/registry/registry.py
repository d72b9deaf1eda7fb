"""The registry: every user's adapters, the bundles made from them, and what is served where.

Adapters, bases and bundles are immutable and named by their content; the catalogue says which user holds
which. An adapter is stored as pairs (A, B), or as a core in a basis that is stored (`forms`). How they are
trained and what a bundle means is not known here: a bundle is bytes and their SHA-256.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from soppu import files, published
from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.blobs import Blobs, LocalBlobs, open_blobs
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import RegistryError, StorageError
from soppu.published import bundle_key, check_bundle
from soppu.registry import bases as told
from soppu.registry import forms, ledger, pages
from soppu.registry.adapters import Adapters
from soppu.registry.bases import Bases
from soppu.registry.catalogue import (
    AdapterSet,
    Bundle,
    Catalogue,
    Holding,
    Publication,
    SetMember,
    check_user_id,
    insert_if_absent,
    now,
)
from soppu.registry.forms import CORE
from soppu.registry.ledger import ForgetReport

T = TypeVar("T")
P = ParamSpec("P")


def _asked(question: Callable[Concatenate[Session, P], T]) -> Callable[Concatenate[Registry, P], T]:
    """A method that asks the ledger this question, in a transaction of its own."""

    @wraps(question)
    def method(registry: Registry, /, *args: P.args, **options: P.kwargs) -> T:
        with registry._catalogue.read() as session:
            return question(session, *args, **options)

    return method


class Registry:
    """A store of blobs and its catalogue, for any number of threads and processes at once."""

    def __init__(self, blobs: Blobs, catalogue: Catalogue) -> None:
        self._blobs = blobs
        self._catalogue = catalogue
        self._adapters = Adapters(blobs, catalogue)
        self._bases = Bases(blobs, catalogue)

    @classmethod
    def open(
        cls, root: str | Path, *, catalogue: str = "", cache: str | Path = "", create: bool = True
    ) -> Registry:
        """Open the registry at `root`, a folder or any fsspec URL.

        Args:
            catalogue: SQLAlchemy URL; "" is a SQLite file inside a local root.
            cache: folder for local copies of a remote root; "" is one under the user's cache folder.
            create: False refuses a registry that is not there yet.

        Raises:
            RegistryError: no such registry, a newer one, or a remote root without a catalogue.
        """
        blobs = open_blobs(root, cache=cache)
        url = catalogue or _catalogue_inside(blobs, create=create)
        return cls(blobs, Catalogue.open(url, create=create))

    @property
    def catalogue(self) -> Catalogue:
        """Its database, for tables that lie beside the catalogue's."""
        return self._catalogue

    def close(self) -> None:
        """Let go of database connections. A closed registry opens them again when it is used."""
        self._catalogue.close()

    def put_basis(self, basis: CoreBasis) -> str:
        """Store a basis, which cores may be told in from then on. Idempotent. Returns its id, "u-<16 hex>".

        Raises:
            AdapterError: the basis is malformed, not float32, or not finite.
            RegistryError: the stored copy of this id is damaged.
            StorageError: a write was refused; files and catalogue are what they were.
        """
        return self._bases.put(basis)

    def get_basis(self, basis_id: str) -> CoreBasis:
        """Read a basis; what is given is kept and shared, not to be changed.

        Raises RegistryError: unknown, or not what its id says.
        """
        return self._bases.get(basis_id)

    def use_basis(self, basis_id: str) -> None:
        """Put a basis in force for its base model; those before stay in the history. Idempotent.

        Raises:
            RegistryError: unknown basis.
        """
        self._bases.use(basis_id)

    def put_start(self, basis_id: str, adapter: LoraAdapter) -> None:
        """Store the adapter that cores in a basis begin at: what its users shared. The first one stays.

        Raises:
            RegistryError: unknown basis.
            AdapterError: the adapter is malformed or not finite.
        """
        self._bases.put_start(basis_id, adapter)

    def get_start(self, basis_id: str) -> LoraAdapter | None:
        """What `put_start` stored; None where nothing was. RegistryError if it is damaged."""
        return self._bases.get_start(basis_id)

    def put_adapter(
        self,
        adapter: LoraAdapter | CoreAdapter,
        *,
        user: str,
        run: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Store an adapter or a core and make it the user's current one. Idempotent.

        Putting the current adapter again under the same run adds no history; `metrics` join those of its row.

        Returns:
            "a-" or, of a core, "c-", and the first 16 hex digits of the content hash.

        Raises:
            AdapterError: the adapter is malformed or not finite, or the core does not fit its basis.
            RegistryError: the user id or a metric is not valid, the stored copy of this id is damaged, or the
                basis of the core is not stored.
            StorageError: a write was refused; files and catalogue are what they were.
        """
        check_user_id(user)
        measured = _checked_metrics(metrics or {}, user)
        form = forms.form_of(adapter, who=f"user {user!r}", basis_of=self.get_basis)
        new = Holding(user_id=user, adapter_id=form.id, run=run, metrics=measured, at=now())
        self._adapters.put(form, new)
        return form.id

    def get_adapter(self, adapter_id: str) -> LoraAdapter:
        """Read an adapter; a core is told as the same change in pairs, exact but for float32's rounding.

        Raises:
            RegistryError: it is unknown, forgotten, or not what its id says, or its basis is damaged.
        """
        row = self._adapters.stored(adapter_id)
        if row.kind != CORE:
            return self._adapters.pairs(row)
        core = self._adapters.core(row)
        return CoreInBasis(core, self.get_basis(core.basis_id), who=f"adapter {adapter_id}").to_lora()

    def get_core(self, adapter_id: str) -> CoreAdapter:
        """Read a core as it is. RegistryError as `get_adapter`, and for an adapter that is none."""
        return self._adapters.core(self._adapters.stored(adapter_id))

    def adapter_bytes(self, adapter_id: str) -> int:
        """Bytes of the adapter's safetensors file; of a core its own, without the basis.

        Raises:
            RegistryError: it is unknown or forgotten.
        """
        return self._adapters.size(self._adapters.stored(adapter_id))

    def owner(self, adapter_id: str) -> tuple[str, ...]:
        """The users whose history holds the adapter, sorted. RegistryError if it is unknown or forgotten."""
        self._adapters.stored(adapter_id)
        query = sa.select(Holding.user_id).where(Holding.adapter_id == adapter_id).distinct()
        with self._catalogue.read() as session:
            return tuple(sorted(session.scalars(query)))

    def freeze_current(
        self,
        base: Base,
        *,
        chosen: Mapping[str, str] | None = None,
        without: Collection[str] = (),
        run: str = "",
    ) -> str:
        """Fix the current adapter of every user of one base model, as they all are at one instant.

        Whose adapter is of `base` is told as `soppu.base_identity.same` does; a warning names who is left out
        because their adapter does not say it. `chosen` (user -> adapter id) become current for their users
        under `run`, and are frozen, in the same transaction, whatever others put meanwhile; users in
        `without` have no current adapter from then on, and keep their history. Reads the catalogue alone, no
        tensors. Idempotent.

        Returns:
            "s-" and 16 hex digits of the SHA-256 of the sorted pairs.

        Raises:
            RegistryError: no users, or one in `chosen` does not hold the adapter named.
        """
        with self._catalogue.write() as session:
            return ledger.freeze_current(session, base, chosen=chosen or {}, without=without, run=run)

    def freeze(self, members: Mapping[str, str]) -> str:
        """Fix these users (user -> adapter id) as a set, whatever is current. Idempotent. Returns its id.

        Raises:
            RegistryError: nobody, or one who does not hold the adapter beside them.
        """
        if not members:
            raise RegistryError("a set needs at least one user, got none")
        with self._catalogue.write() as session:
            ledger.hold_still(session, members)
            return ledger.freeze(session, members)

    def get_set(self, set_id: str) -> dict[str, str]:
        """User -> adapter id of a frozen set, sorted; forgotten users too. RegistryError if it is unknown."""
        query = sa.select(SetMember.user_id, SetMember.adapter_id).where(SetMember.set_id == set_id)
        with self._catalogue.read() as session:
            members = sorted((user, adapter_id) for user, adapter_id in session.execute(query))
        if not members:
            raise RegistryError(f"unknown set {set_id!r}")
        return dict(members)

    def put_bundle(self, data: bytes, *, set_id: str, run: str = "") -> str:
        """Store a bundle compressed from a set. Idempotent. Returns the SHA-256 of the file, 64 hex digits.

        Raises:
            RegistryError: unknown set, or the bundle is stored for another set already.
            StorageError: a write was refused; files and catalogue are what they were.
        """
        self.get_set(set_id)
        bundle_id = hashlib.sha256(data).hexdigest()
        fill = partial(files.write_bytes, data=data)
        self._blobs.put(bundle_key(bundle_id), fill, partial(check_bundle, bundle_id))
        with self._catalogue.write() as session:
            frozen = session.get_one(AdapterSet, set_id, with_for_update=True)
            values = {"set_id": set_id, "run": run, "contains_forgotten": False, "created_at": now()}
            insert_if_absent(session, Bundle, id=bundle_id, **values)
            row = session.get_one(Bundle, bundle_id, with_for_update=True)
            if row.set_id != set_id:
                raise RegistryError(f"bundle {bundle_id[:12]} is stored for set {row.set_id}, not {set_id}")
            row.contains_forgotten = frozen.contains_forgotten
        return bundle_id

    def bundle(self, bundle_id: str) -> Bundle:
        """What the catalogue says of a bundle. RegistryError if it is unknown."""
        with self._catalogue.read() as session:
            row = session.get(Bundle, bundle_id)
        if row is None:
            raise RegistryError(f"unknown bundle {bundle_id!r}")
        return row

    def bundle_path(self, bundle_id: str) -> Path:
        """The bundle's file on this machine. RegistryError if it is unknown or has another hash. O(size)."""
        self.bundle(bundle_id)
        return published.bundle_path(self._blobs, bundle_id)

    def bundle_bytes(self, bundle_id: str) -> int:
        """Bytes of the bundle's file. RegistryError if it is unknown."""
        self.bundle(bundle_id)
        return self._blobs.size(bundle_key(bundle_id))

    current = _asked(ledger.current_adapter)
    current_set = _asked(ledger.current_set)
    users = _asked(ledger.user_rows)
    history = _asked(ledger.history_rows)
    publications = _asked(ledger.publications)
    identity = _asked(ledger.identity)
    current_basis = _asked(told.in_force)
    bases = _asked(told.rows)
    free_since_basis = _asked(told.free_since)
    basis_uses = _asked(told.uses)
    bases_of_set = _asked(told.of_set)
    told_in = _asked(told.told_in)
    forgotten_at = _asked(ledger.forgotten_at)

    def publishing(self, url: str) -> AbstractContextManager[None]:
        """Hold the right to switch what `url` serves, and to record it: one holder a machine at a time."""
        name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        return files.exclusive(self._blobs.here / "locks" / name)

    resolve = _asked(ledger.resolve)
    addresses = _asked(pages.addresses)
    targets_in_force = _asked(pages.targets_in_force)
    live = _asked(ledger.live)
    placements = _asked(ledger.placements)
    user_count = _asked(pages.user_count)
    user_page = _asked(pages.user_page)
    in_force = _asked(pages.in_force)
    held = _asked(pages.held)

    def record_publication(
        self, *, target: str, url: str, bundle_id: str, placements: Mapping[str, str] | None = None
    ) -> None:
        """Note that a target serves a bundle from now on; a rollback is a publication of the older one.

        A target that serves the bundle already, by the same ids, gets no second row.

        Args:
            placements: user -> the id a request has to ask for, where it is not the user's name. For a server
                that keeps no names this record is the switch itself.

        Raises:
            RegistryError: the bundle is unknown; or placements are given and one of its users was forgotten.
            StorageError: the store refused the note that servers follow; nothing was recorded.
        """
        self.bundle(bundle_id)
        new = Publication(target=target, url=url, bundle_id=bundle_id)
        with self._catalogue.write() as session:
            row = ledger.publish(session, new, placements or {})
            told = published.Pointer(bundle_id=bundle_id, target=target, url=url, at=row.at)
            published.write(self._blobs, told)

    def forget(self, user: str) -> ForgetReport:
        """Delete a user's history and metrics, and every adapter that nobody else holds.

        Sets and bundles that contain the user stay, marked: a bundle's basis is everybody's. A published one
        serves the user's core until a bundle without it takes its place. The id stays in the sets. Forgetting
        again finishes what was interrupted; a user may come back with `put_adapter`.

        Raises:
            RegistryError: unknown user.
            StorageError: the catalogue refused (nothing was changed), or a file could not be deleted (the
                user is out of `current_set` already; forget again).
        """
        with self._catalogue.write() as session:
            ledger.drop_holdings(session, user)
            sets, bundles = ledger.mark_forgotten(session, user)
            still = tuple(one for one, _, _ in ledger.serving(session, user))
        removed = self._adapters.remove_unheld()
        self._catalogue.scrub()
        return ForgetReport(user, removed, sets, bundles, publications_still_serving=still)


def _catalogue_inside(blobs: Blobs, *, create: bool) -> sa.URL:
    if not isinstance(blobs, LocalBlobs):
        raise RegistryError(
            f"registry {blobs.name}: a remote root needs a catalogue of its own, a SQLAlchemy URL "
            "(postgresql://..., sqlite:///file.db)"
        )
    if create:
        try:
            blobs.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"registry {blobs.name}: cannot be created: {error}") from error
    return sa.URL.create("sqlite", database=str(blobs.root / "catalogue.db"))


def _checked_metrics(metrics: Mapping[str, float], user: str) -> dict[str, float]:
    checked = {name: float(value) for name, value in metrics.items()}
    for name, value in checked.items():
        if not math.isfinite(value):
            raise RegistryError(f"user {user!r}: metric {name!r} is {value}, it must be finite")
    return checked
