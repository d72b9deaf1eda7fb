"""What the registry asks of its catalogue, and the rows it answers with.

Every function works inside the session it is given and commits nothing. Rows are locked in one order
everywhere (user, adapters, sets, bundles), so that two transactions never wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from soppu import base_identity
from soppu.base_identity import Base
from soppu.cores.core import CoreAdapter
from soppu.errors import RegistryError
from soppu.registry.catalogue import (
    Adapter,
    AdapterSet,
    Bundle,
    Core,
    Holding,
    Placement,
    Publication,
    SchemaRow,
    SetMember,
    User,
    insert_if_absent,
    now,
)
from soppu.registry.forms import Form

_LOG = logging.getLogger(__name__)
_CHUNK = 500  # users in one statement; databases limit how many parameters it may have


@dataclass(frozen=True)
class UserRow:
    """A user and their current adapter."""

    user: str
    adapter_id: str
    at: str  # UTC ISO: the adapter became current then, `run` and `metrics` came with it
    run: str
    metrics: Mapping[str, float]
    versions: int  # rows of the user's history
    published: Mapping[str, str]  # place (`Publication.place`) -> the user's adapter that is served there now


@dataclass(frozen=True)
class HistoryRow:
    """One adapter that was a user's current one from `at` on."""

    adapter_id: str
    at: str
    run: str
    metrics: Mapping[str, float]
    current: bool  # the user's newest row
    published: tuple[str, ...]  # the places (`Publication.place`) that serve this version now


@dataclass(frozen=True)
class Address:
    """Where a user is served, and what a request has to ask for there."""

    target: str
    url: str
    asked_as: str  # `adapter_id` of a request; `model` of OpenAI's routes
    bundle_id: str
    adapter_id: str  # the user's adapter that is in the bundle
    since: str


@dataclass(frozen=True)
class ForgetReport:
    """What forgetting a user did, and what it could not do."""

    user: str
    adapters_removed: tuple[str, ...]  # those that nobody else held
    sets_touched: tuple[str, ...]  # sets that contain the user, now marked so
    bundles_touched: tuple[str, ...]  # bundles made from those sets, now marked so
    publications_still_serving: tuple[Publication, ...]  # they hold the user's core until they are replaced


def find_user(session: Session, user: str, *, lock: bool = False) -> User:
    """The user's row, forgotten or not. RegistryError if there is none."""
    row = session.get(User, user, with_for_update=lock or None)
    if row is None:
        known = session.scalar(sa.select(sa.func.count(User.holding_id)))
        raise RegistryError(f"unknown user {user!r}; the registry holds {known} users")
    return row


def forgotten_at(session: Session, user: str) -> str:
    """When a user was forgotten, UTC ISO; "" for one who is not, or is unknown."""
    row = session.get(User, user)
    return (row.forgotten_at or "") if row else ""


def claim_user(session: Session, user: str) -> User:
    """The user's row, locked, made if there is none."""
    insert_if_absent(session, User, id=user, holding_id=None, created_at=now(), forgotten_at=None)
    return find_user(session, user, lock=True)


def claim_adapter(session: Session, form: Form) -> Adapter:
    """The adapter's row, locked, made if there is none; a core's basis is noted beside it.

    Raises:
        RegistryError: the row belongs to another content with the same first 16 digits.
    """
    content = form.adapter.content_hash()
    insert_if_absent(
        session,
        Adapter,
        id=form.id,
        kind=form.kind,
        content=content,
        base_model=form.base.name,
        base_hash=form.base.hash,
        state="stored",
        removals=0,
        created_at=now(),
    )
    row = session.get_one(Adapter, form.id, with_for_update=True)
    if row.content != content:
        raise RegistryError(f"adapter {form.id}: taken by other content ({row.content})")
    if isinstance(form.adapter, CoreAdapter):
        insert_if_absent(session, Core, adapter_id=form.id, basis_id=form.adapter.basis_id)
    return row


def identity(session: Session) -> str:
    """Names this registry: its birth mark, and how many adapters were deleted from it since.

    What was concluded from a registry (a cached result that holds ids) is void when this changes.
    """
    birth = session.scalar(sa.select(SchemaRow.birth))
    deleted = session.scalar(sa.select(sa.func.coalesce(sa.func.sum(Adapter.removals), 0)))
    return f"{birth}-{deleted}"


def removals(session: Session, adapter_id: str, *, lock: bool = False) -> int:
    """How often the adapter's blob was deleted; with `lock`, once any deletion under way has ended."""
    row = session.get(Adapter, adapter_id, with_for_update=lock or None)
    return 0 if row is None else row.removals


def hold(session: Session, owner: User, holding: Holding) -> None:
    """Make the holding the owner's newest; the same adapter under the same run only gains metrics."""
    newest = session.get(Holding, owner.holding_id) if owner.holding_id is not None else None
    if newest is not None and (newest.adapter_id, newest.run) == (holding.adapter_id, holding.run):
        newest.metrics = {**newest.metrics, **holding.metrics}
        return
    session.add(holding)
    session.flush()  # gives the holding its number
    owner.holding_id = holding.id
    owner.forgotten_at = None


def check_held(session: Session, pairs: list[tuple[str, str]]) -> None:
    """RegistryError naming the first user who does not hold the adapter beside them."""
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        of_them = Holding.user_id.in_([user for user, _ in chunk])
        query = sa.select(Holding.user_id, Holding.adapter_id).where(of_them).distinct()
        held = {(user, adapter_id) for user, adapter_id in session.execute(query)}
        for user, adapter_id in chunk:
            if (user, adapter_id) not in held:
                raise RegistryError(f"user {user!r} does not hold adapter {adapter_id!r}")


def current_set(session: Session, *, base: Base | None = None) -> dict[str, str]:
    """User -> current adapter id, sorted, of all who are not forgotten; of one base model if given."""
    query = (
        sa.select(User.id, Holding.adapter_id, Adapter.base_model, Adapter.base_hash)
        .join(Holding, User.holding_id == Holding.id)
        .join(Adapter, Adapter.id == Holding.adapter_id)
    )
    rows = sorted(session.execute(query).tuples())
    return {user: held for user, held, *of in rows if base is None or base_identity.same(Base(*of), base)}


def freeze_current(
    session: Session, base: Base, *, chosen: Mapping[str, str], without: Collection[str] = (), run: str = ""
) -> str:
    """Make `chosen` current, for those `without` nothing, and fix what everybody of a base has then; its id.

    Raises:
        RegistryError: nobody is in the set, or one in `chosen` does not hold the adapter named.
    """
    hold_still(session, chosen)
    before = current_set(session)
    for user, adapter_id in chosen.items():
        if before.get(user) != adapter_id:  # an earlier configuration's run, again; or one overtaken
            new = Holding(user_id=user, adapter_id=adapter_id, run=run, metrics={}, at=now())
            hold(session, find_user(session, user), new)
    for user in sorted(without):
        find_user(session, user).holding_id = None
    session.flush()
    members = {**current_set(session, base=base), **chosen}
    unhashed = sa.select(User.id).join(Holding, User.holding_id == Holding.id).join(Adapter)
    if left_out := set(session.scalars(unhashed.where(Adapter.base_hash == ""))) - members.keys():
        _LOG.warning(
            "left out of the set: %s: their adapters have no base hash, and a base name that does not say it"
            " is %s; %s",
            ", ".join(sorted(left_out)),
            base,
            base_identity.CURE,
        )
    if not members:
        raise RegistryError("a set needs at least one user, got none")
    return freeze(session, members)


def hold_still(session: Session, members: Mapping[str, str]) -> None:
    """Nobody's adapter changes before the transaction ends. RegistryError: one does not hold theirs."""
    # every user, in the order of ids
    session.execute(sa.select(User.id).order_by(User.id).with_for_update())
    check_held(session, sorted(members.items()))


def freeze(session: Session, members: Mapping[str, str]) -> str:
    """Fix who holds which adapter, which `hold_still` has made sure of; the set's id."""
    pairs = sorted(members.items())
    set_id = f"s-{hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]}"
    if insert_if_absent(session, AdapterSet, id=set_id, contains_forgotten=False, created_at=now()):
        rows = [{"set_id": set_id, "user_id": user, "adapter_id": held} for user, held in pairs]
        session.execute(sa.insert(SetMember), rows)
    # Every user holds their adapter now: one who was forgotten has come back with it.
    session.get_one(AdapterSet, set_id, with_for_update=True).contains_forgotten = False
    return set_id


def drop_holdings(session: Session, user: str) -> None:
    """Delete the user's history; adapters nobody holds any more become "removing"."""
    row = find_user(session, user, lock=True)
    held = session.scalars(sa.select(Holding.adapter_id).where(Holding.user_id == user).distinct()).all()
    for table in (Holding, Placement):
        session.execute(sa.delete(table).where(table.user_id == user))
    row.holding_id = None
    row.forgotten_at = row.forgotten_at or now()
    for adapter_id in sorted(held):
        adapter = session.get_one(Adapter, adapter_id, with_for_update=True)
        if session.scalar(sa.select(Holding.id).where(Holding.adapter_id == adapter_id).limit(1)) is None:
            adapter.state = "removing"


def mark_forgotten(session: Session, user: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mark every set and bundle that contains the user; the ids of both, sorted."""
    sets = sa.select(SetMember.set_id).where(SetMember.user_id == user)
    bundles = sa.select(Bundle.id).where(Bundle.set_id.in_(sets))
    for table, key in ((AdapterSet, AdapterSet.id), (Bundle, Bundle.set_id)):
        session.execute(sa.update(table).where(key.in_(sets)).values(contains_forgotten=True))
    return tuple(sorted(session.scalars(sets))), tuple(sorted(session.scalars(bundles)))


def publications(session: Session, url: str = "") -> list[Publication]:
    """Every publication ever recorded, newest first; with a URL those to that server."""
    rows = session.scalars(sa.select(Publication).order_by(Publication.id.desc()))
    return [one for one in rows if url.rstrip("/") in ("", one.url.rstrip("/"))]


def live(session: Session, url: str) -> str:
    """Id of the bundle that was switched to last at a URL, "" for none."""
    return next((one.bundle_id for one in publications(session, url)), "")


def placements(session: Session, url: str) -> dict[str, str]:
    """User -> the id asked for since the last publication at a URL; empty where names are asked for."""
    return next((_placed(session, one) for one in publications(session, url)), {})


def _placed(session: Session, publication: Publication) -> dict[str, str]:
    asked = sa.select(Placement.user_id, Placement.asked_as)
    return dict(session.execute(asked.where(Placement.publication_id == publication.id)).tuples().all())


def newest_of_each() -> sa.Select[tuple[int]]:
    """A query for the publications in force: the ids of the newest of every target and URL."""
    return sa.select(sa.func.max(Publication.id)).group_by(Publication.target, Publication.url)


def serving(session: Session, user: str | None = None) -> list[tuple[Publication, str, str]]:
    """(publication in force, user, adapter served there) of every user or of one. O(users x targets)."""
    query = (
        sa.select(Publication, SetMember.user_id, SetMember.adapter_id)
        .join(Bundle, Bundle.id == Publication.bundle_id)
        .join(SetMember, SetMember.set_id == Bundle.set_id)
        .where(Publication.id.in_(newest_of_each()))
        .order_by(Publication.target, Publication.url)
    )
    if user is not None:
        query = query.where(SetMember.user_id == user)
    return list(session.execute(query).tuples())


def publish(session: Session, publication: Publication, placements: Mapping[str, str]) -> Publication:
    """Put a publication in force with its placements, unless it is already; the one in force.

    Raises as `Registry` says.
    """
    bundle = session.get_one(Bundle, publication.bundle_id, with_for_update=True)
    if placements and bundle.contains_forgotten:
        raise RegistryError(
            f"bundle {bundle.id[:12]}: a user of it was forgotten; compress again without them"
        )
    there = sa.select(Publication).filter_by(target=publication.target, url=publication.url)
    newest = session.scalar(there.order_by(Publication.id.desc()).limit(1))
    if newest is not None and newest.bundle_id == bundle.id and _placed(session, newest) == dict(placements):
        return newest
    publication.at = now()
    session.add(publication)
    session.flush()
    rows = [
        {"publication_id": publication.id, "user_id": user, "asked_as": asked_as}
        for user, asked_as in placements.items()
    ]
    for start in range(0, len(rows), _CHUNK):
        session.execute(sa.insert(Placement), rows[start : start + _CHUNK])
    return publication


def resolve(session: Session, user: str) -> list[Address]:
    """Where a user is served now, and by what id; sorted by target and URL.

    Raises:
        RegistryError: the user is unknown or forgotten.
    """
    current_adapter(session, user)
    asked = {
        row.publication_id: row.asked_as
        for row in session.scalars(sa.select(Placement).where(Placement.user_id == user))
    }
    return [
        Address(one.target, one.url, asked.get(one.id, user), one.bundle_id, adapter_id, one.at)
        for one, _, adapter_id in serving(session, user)
    ]


def current_adapter(session: Session, user: str) -> str:
    """The id of the user's current adapter. RegistryError if the user is unknown or forgotten."""
    query = sa.select(Holding.adapter_id).join(User, User.holding_id == Holding.id).where(User.id == user)
    adapter_id = session.scalar(query)
    if adapter_id is None:
        raise RegistryError(f"user {user!r} was forgotten at {find_user(session, user).forgotten_at}")
    return adapter_id


def user_rows(session: Session) -> list[UserRow]:
    """Every user who is not forgotten, sorted."""
    published: dict[str, dict[str, str]] = {}
    for one, user, adapter_id in serving(session):
        published.setdefault(user, {})[one.place] = adapter_id
    counts = sa.select(Holding.user_id, sa.func.count("*").label("n")).group_by(Holding.user_id).subquery()
    query = (
        sa.select(Holding, counts.c.n)
        .join(User, User.holding_id == Holding.id)
        .join(counts, counts.c.user_id == Holding.user_id)
    )
    rows = [
        UserRow(row.user_id, *facts(row), versions=n, published=published.get(row.user_id, {}))
        for row, n in session.execute(query)
    ]
    return sorted(rows, key=lambda row: row.user)


def history_rows(session: Session, user: str) -> list[HistoryRow]:
    """Every adapter the user held, oldest first; empty for a forgotten user. RegistryError if unknown."""
    find_user(session, user)
    places = [(one.place, adapter_id) for one, _, adapter_id in serving(session, user)]
    query = (
        sa.select(Holding, User.holding_id)
        .join(User, User.id == Holding.user_id)
        .where(Holding.user_id == user)
        .order_by(Holding.id)
    )
    return [
        HistoryRow(
            *facts(row),
            current=row.id == newest,
            published=tuple(place for place, adapter_id in places if adapter_id == row.adapter_id),
        )
        for row, newest in session.execute(query)
    ]


def facts(row: Holding) -> tuple[str, str, str, dict[str, float]]:
    """What a row of the history says: adapter, since when, run, metrics."""
    return row.adapter_id, row.at, row.run, dict(row.metrics)
