"""Looks at a registry of any size: counts, a page of users, what is in force. None reads everybody."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from soppu.registry.catalogue import Bundle, Holding, Placement, Publication, SetMember, User
from soppu.registry.ledger import Address, HistoryRow, facts, newest_of_each

MOST = 500  # rows of a page
_THEIRS = sa.and_(Placement.publication_id == Publication.id, Placement.user_id == SetMember.user_id)
_PLACE = (Publication.target, Publication.url, Placement.asked_as, Publication.bundle_id)
# built once: that takes twice as long as to ask
_ADDRESSES = (
    sa.select(*_PLACE, SetMember.adapter_id, Publication.at)
    .join(Bundle, Bundle.id == Publication.bundle_id)
    .join(SetMember, SetMember.set_id == Bundle.set_id)
    .join(User, User.id == SetMember.user_id)
    .outerjoin(Placement, _THEIRS)
    .where(SetMember.user_id == sa.bindparam("user"), User.holding_id.is_not(None))
    .where(Publication.id.in_(newest_of_each()))
    .order_by(Publication.target, Publication.url)
)


@dataclass(frozen=True)
class UserLine:
    """One user who is not forgotten, and their current adapter."""

    user: str
    adapter_id: str
    at: str
    run: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class UserPage:
    """Users in the order of their ids; whether others come before them, and after them."""

    rows: tuple[UserLine, ...]
    more: bool
    earlier: bool = False


@dataclass(frozen=True)
class InForce:
    """The newest publication of one target, and how many users its bundle has."""

    target: str
    url: str
    bundle_id: str
    at: str
    run: str
    users: int


def user_count(session: Session) -> int:
    """How many users hold an adapter."""
    return session.scalar(sa.select(sa.func.count(User.holding_id))) or 0


def user_page(
    session: Session, *, holding: str = "", after: str = "", before: str = "", limit: int = 50
) -> UserPage:
    """The users behind `after`, or the last before `before`, whose id has `holding` in it.

    At most `limit` (of `MOST`) of them. O(limit) where everybody is asked for; with `holding` as many ids are
    looked at as it takes. Whether the user that is named is there is not looked at.
    """
    limit = max(1, min(limit, MOST))
    query = sa.select(Holding).join(User, User.holding_id == Holding.id).limit(limit + 1)
    if before:
        query = query.where(User.id < before).order_by(User.id.desc())
    else:
        query = query.where(User.id > after).order_by(User.id)
    if holding:
        query = query.where(User.id.contains(holding, autoescape=True))
    rows = [UserLine(row.user_id, *facts(row)) for row in session.scalars(query)]
    beyond, rows = len(rows) > limit, rows[:limit]
    if before:
        return UserPage(tuple(reversed(rows)), more=True, earlier=beyond)
    return UserPage(tuple(rows), more=beyond, earlier=bool(after))


def in_force(session: Session) -> tuple[InForce, ...]:
    """What every target serves now, by target and URL. Sets are counted in the database."""
    members = sa.select(sa.func.count()).where(SetMember.set_id == Bundle.set_id).scalar_subquery()
    query = (
        sa.select(Publication, Bundle.run, members)
        .join(Bundle, Bundle.id == Publication.bundle_id)
        .where(Publication.id.in_(newest_of_each()))
        .order_by(Publication.target, Publication.url)
    )
    return tuple(
        InForce(one.target, one.url, one.bundle_id, one.at, run, users)
        for one, run, users in session.execute(query)
    )


def addresses(session: Session, user: str) -> list[Address]:
    """As `ledger.resolve`, in one query, for each request of a gateway.

    Nowhere for a user who is unknown or forgotten, or was given the base model.
    """
    return [
        Address(target, url, user if asked is None else asked, *rest)
        for target, url, asked, *rest in session.execute(_ADDRESSES, {"user": user})
    ]


def targets_in_force(session: Session) -> list[tuple[str, str]]:
    """Target and URL of every publication in force, the last one first."""
    newest = Publication.id.in_(newest_of_each())
    query = sa.select(Publication.target, Publication.url).where(newest).order_by(Publication.id.desc())
    return [(target, url) for target, url in session.execute(query)]


def held(session: Session, adapter_id: str, *, limit: int = 50) -> tuple[tuple[str, HistoryRow], ...]:
    """Every time somebody came to hold an adapter, by user and time, the first `limit` of them. O(limit)."""
    query = (
        sa.select(Holding, User.holding_id)
        .join(User, User.id == Holding.user_id)
        .where(Holding.adapter_id == adapter_id)
        .order_by(Holding.user_id, Holding.id)
        .limit(limit)
    )
    rows = session.execute(query).tuples().all()
    served = _served(session, adapter_id, {row.user_id for row, _ in rows})
    return tuple(
        (row.user_id, HistoryRow(*facts(row), row.id == newest, tuple(served.get(row.user_id, ()))))
        for row, newest in rows
    )


def _served(session: Session, adapter_id: str, users: Collection[str]) -> dict[str, list[str]]:
    """User -> the places that serve this adapter to them now."""
    query = (
        sa.select(SetMember.user_id, Publication)
        .join(Bundle, Bundle.set_id == SetMember.set_id)
        .join(Publication, Publication.bundle_id == Bundle.id)
        .where(SetMember.adapter_id == adapter_id, SetMember.user_id.in_(users))
        .where(Publication.id.in_(newest_of_each()))
        .order_by(Publication.target, Publication.url)
    )
    found: dict[str, list[str]] = {}
    for user, one in session.execute(query):
        found.setdefault(user, []).append(one.place)
    return found
