"""The bases that cores are told in: their files, and which of them is in force for a base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from soppu import adapter as peft_folder
from soppu import base_identity
from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.blobs import Blobs
from soppu.cores import basis as bases
from soppu.cores import basis_file
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError, RegistryError
from soppu.registry.catalogue import (
    Adapter,
    Basis,
    BasisUse,
    Catalogue,
    Core,
    Holding,
    SetMember,
    insert_if_absent,
    now,
)
from soppu.registry.forms import LORA

_CHUNK = 500  # ids in one statement; databases limit how many parameters it may have
_KEPT = 2  # in memory, each as large as a bundle's own: a core is carried over from one to another


@dataclass(frozen=True)
class BasisRow:
    """A basis, and how many of the cores that are stored are told in it."""

    basis_id: str
    base_model: str
    base_hash: str
    at: str  # UTC ISO: it came into the registry then
    cores: int
    in_force: bool


class Bases:
    """The bases of one registry, for any number of threads."""

    def __init__(self, blobs: Blobs, catalogue: Catalogue) -> None:
        self._blobs = blobs
        self._catalogue = catalogue
        self._read = lru_cache(_KEPT)(self._fetch)

    def put(self, basis: CoreBasis) -> str:
        """As `Registry.put_basis`."""
        fresh = replace(basis)  # a hash kept from before would miss a change made to the tensors since
        bases.validate(fresh, who="basis")
        check = partial(_checked, fresh.id, fresh.content_hash())
        self._blobs.put(_key(fresh.id), partial(basis_file.write, fresh), check)
        with self._catalogue.write() as session:
            row = {
                "content": fresh.content_hash(),
                "base_model": fresh.base_model,
                "base_hash": fresh.base_hash,
            }
            insert_if_absent(session, Basis, id=fresh.id, created_at=now(), **row)
        return fresh.id

    def get(self, basis_id: str) -> CoreBasis:
        """As `Registry.get_basis`. The last ones read are kept, and shared: they are not to be changed."""
        return self._read(basis_id)

    def use(self, basis_id: str) -> None:
        """As `Registry.use_basis`."""
        with self._catalogue.write() as session:
            row = find(session, basis_id)
            if in_force(session, Base(row.base_model, row.base_hash)) != basis_id:
                session.add(BasisUse(basis_id=basis_id, at=now()))

    def put_start(self, basis_id: str, adapter: LoraAdapter) -> None:
        """As `Registry.put_start`."""
        peft_folder.validate(adapter, who=f"start of {basis_id}")
        with self._catalogue.read() as session:
            find(session, basis_id)
        check = partial(_start, basis_id)
        self._blobs.put(_start_key(basis_id), partial(peft_folder.write, adapter), check)

    def get_start(self, basis_id: str) -> LoraAdapter | None:
        """As `Registry.get_start`."""
        key = _start_key(basis_id)
        return self._blobs.fetch(key, partial(_start, basis_id)) if self._blobs.has(key) else None

    def _fetch(self, basis_id: str) -> CoreBasis:
        with self._catalogue.read() as session:
            content = find(session, basis_id).content
        return self._blobs.fetch(_key(basis_id), partial(_checked, basis_id, content))


def find(session: Session, basis_id: str) -> Basis:
    """The row of a basis. RegistryError if there is none."""
    row = session.get(Basis, basis_id)
    if row is None:
        raise RegistryError(f"unknown basis {basis_id!r}")
    return row


def in_force(session: Session, base: Base) -> str:
    """The id of the basis that was put in force last for a base model, "" for none. O(uses)."""
    query = sa.select(Basis.base_model, Basis.base_hash, Basis.id).join(BasisUse)
    uses = session.execute(query.order_by(BasisUse.id.desc())).tuples()
    return next((basis_id for *of, basis_id in uses if base_identity.same(Base(*of), base)), "")


def of_set(session: Session, set_id: str) -> dict[str, int]:
    """Basis id -> how many of a set's users have cores in it; "" counts those whose adapters are no cores."""
    query = (
        sa.select(sa.func.coalesce(Core.basis_id, ""), sa.func.count())
        .select_from(SetMember)
        .outerjoin(Core, Core.adapter_id == SetMember.adapter_id)
        .where(SetMember.set_id == set_id)
        .group_by(Core.basis_id)
    )
    return dict(session.execute(query).tuples().all())


def uses(session: Session) -> list[tuple[str, str]]:
    """Every basis that was put in force, and when (UTC ISO), oldest first."""
    query = sa.select(BasisUse.basis_id, BasisUse.at).order_by(BasisUse.id)
    return [(basis_id, at) for basis_id, at in session.execute(query)]


def free_since(session: Session, basis_id: str, *, limit: int) -> dict[str, str]:
    """User -> the newest adapter in pairs that came since a basis is in force; the newest users, sorted.

    Only of the basis' base model, and not what several users hold: that is nobody's own.

    Raises:
        RegistryError: the basis is unknown, or was never put in force.
    """
    row = find(session, basis_id)
    since = session.scalar(sa.select(sa.func.max(BasisUse.at)).where(BasisUse.basis_id == basis_id))
    if since is None:
        raise RegistryError(f"basis {basis_id} was never put in force")
    query = (
        sa.select(Holding.user_id, Holding.adapter_id, Adapter.base_model, Adapter.base_hash)
        .join(Adapter, Adapter.id == Holding.adapter_id)
        .where(Holding.at > since, Adapter.kind == LORA, Adapter.state == "stored")
        .order_by(Holding.id.desc())
    )
    base, newest = Base(row.base_model, row.base_hash), dict[str, str]()
    for user, held, *of in session.execute(query).tuples():
        if base_identity.same(Base(*of), base):
            newest.setdefault(user, held)
    holders = Counter(newest.values())
    own = [(user, held) for user, held in newest.items() if holders[held] == 1]
    return dict(sorted(own[:limit]))


def told_in(session: Session, adapter_ids: Collection[str]) -> dict[str, str]:
    """Adapter id -> the basis it is told in, of those that are cores."""
    asked, found = sorted(set(adapter_ids)), dict[str, str]()
    for start in range(0, len(asked), _CHUNK):
        some = Core.adapter_id.in_(asked[start : start + _CHUNK])
        found |= dict(session.execute(sa.select(Core.adapter_id, Core.basis_id).where(some)).tuples().all())
    return found


def rows(session: Session) -> list[BasisRow]:
    """Every basis, oldest first. O(bases^2)."""
    there = sa.and_(Core.basis_id == Basis.id, Adapter.id == Core.adapter_id, Adapter.state == "stored")
    cores = sa.select(sa.func.count()).select_from(Core, Adapter).where(there).scalar_subquery()
    found = session.execute(sa.select(Basis, cores).order_by(Basis.created_at, Basis.id)).tuples()
    return [
        BasisRow(one.id, one.base_model, one.base_hash, one.created_at, count, _is_in_force(session, one))
        for one, count in found
    ]


def _is_in_force(session: Session, one: Basis) -> bool:
    return in_force(session, Base(one.base_model, one.base_hash)) == one.id


def _key(basis_id: str) -> str:
    return f"bases/{basis_id}"


def _start_key(basis_id: str) -> str:
    return f"starts/{basis_id}"


def _start(basis_id: str, folder: Path) -> LoraAdapter:
    try:
        return peft_folder.read(folder)
    except AdapterError as error:
        raise RegistryError(f"start of basis {basis_id}: its stored copy is damaged: {error}") from error


def _checked(basis_id: str, content: str, path: Path) -> CoreBasis:
    try:
        basis = basis_file.read(path)
    except AdapterError as error:
        raise RegistryError(f"basis {basis_id}: its stored copy is damaged: {error}") from error
    if basis.content_hash() != content:
        raise RegistryError(f"basis {basis_id}: its stored copy is damaged: content {basis.id}")
    return basis
