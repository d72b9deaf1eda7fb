"""Keys of callers: 256 random bits each, shown once, kept as SHA-256, in the catalogue's database.

Not argon2: a slow hash defends secrets that can be guessed. 2^256 keys cannot be, however fast a hash is, and
a slow one would cost each request its milliseconds, and everybody theirs when somebody sends nonsense.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from soppu.errors import NotThere, RegistryError
from soppu.registry.catalogue import Catalogue, check_user_id, now

PREFIX = "soppu_"
_BYTES = 32


class Base(DeclarativeBase):
    """Tables of their own, beside the catalogue's."""


class KeyRow(Base):
    """One key. `user_id` "" is an admin's; `revoked_at` is set once and stays."""

    __tablename__ = "soppu_gateway_keys"
    digest: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(18), unique=True)
    user_id: Mapped[str] = mapped_column(sa.String(128), index=True)
    note: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[str] = mapped_column(sa.String(32))
    expires_at: Mapped[str | None] = mapped_column(sa.String(32))
    revoked_at: Mapped[str | None] = mapped_column(sa.String(32))


_FOUND = sa.select(KeyRow.__table__).where(KeyRow.digest == sa.bindparam("digest"))


@dataclass(frozen=True)
class Key:
    """What may be told of a key."""

    id: str
    user: str
    admin: bool
    note: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None

    @property
    def good(self) -> bool:
        """Whether it counts now."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now())


class KeyStore:
    """The keys of one catalogue's database, for any number of processes at once."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        with catalogue.read() as session:
            there = sa.inspect(session.connection()).has_table(KeyRow.__tablename__)
        if not there:
            with catalogue.write() as session:
                Base.metadata.create_all(session.connection())

    def create(
        self, user: str = "", *, admin: bool = False, note: str = "", days: float | None = None
    ) -> tuple[str, Key]:
        """A new key of a user, or of an admin: its text, which nobody can tell again, and what is kept of it.

        Raises:
            RegistryError: no valid user id; or both, or neither, of user and admin.
            StorageError: the catalogue refused; there is no new key.
        """
        if admin == bool(user):
            raise RegistryError("a key is a user's or an admin's: exactly one of them")
        if user:
            check_user_id(user)
        text = f"{PREFIX}{'admin' if admin else 'user'}_{secrets.token_urlsafe(_BYTES)}"
        ends = None
        if days is not None:
            ends = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="microseconds")
        row = KeyRow(digest=digest_of(text), id=f"k-{secrets.token_hex(8)}", user_id=user, note=note)
        row.created_at, row.expires_at, row.revoked_at = now(), ends, None
        with self._catalogue.write() as session:
            session.add(row)
        return text, _told(row)

    def find(self, text: str) -> Key | None:
        """The key with this text, if it is one that is good now. O(log keys): a query by primary key."""
        return self.by_digest(digest_of(text))

    def by_digest(self, digest: str) -> Key | None:
        """The same, by what `digest_of` makes of it."""
        with self._catalogue.read() as session:
            row = session.execute(_FOUND, {"digest": digest}).first()
        if row is None:
            return None
        key = Key(
            row.id, row.user_id, not row.user_id, row.note, row.created_at, row.expires_at, row.revoked_at
        )
        return key if key.good else None

    def every(self, user: str = "") -> tuple[Key, ...]:
        """All keys, or a user's, oldest first, revoked ones too."""
        query = sa.select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        if user:
            query = query.where(KeyRow.user_id == user)
        with self._catalogue.read() as session:
            return tuple(_told(row) for row in session.scalars(query))

    def revoke(self, *, key_id: str = "", user: str = "") -> int:
        """Revoke one key, or all of a user; from the next request on. How many were good until now.

        Raises:
            NotThere: no such key, or no key of that user.
            StorageError: the catalogue refused; nothing was revoked.
        """
        which = KeyRow.id == key_id if key_id else KeyRow.user_id == check_user_id(user)
        with self._catalogue.write() as session:
            if session.scalar(sa.select(KeyRow.id).where(which).limit(1)) is None:
                raise NotThere(f"there is no key {key_id!r}" if key_id else f"user {user!r} has no key")
            good = sa.update(KeyRow).where(which, KeyRow.revoked_at.is_(None)).values(revoked_at=now())
            return int(session.execute(good).rowcount)  # type: ignore[attr-defined]


def digest_of(text: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _told(row: KeyRow) -> Key:
    return Key(row.id, row.user_id, not row.user_id, row.note, row.created_at, row.expires_at, row.revoked_at)
