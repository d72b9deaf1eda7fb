"""The registry's catalogue: which user held which adapter when, and what was made from it.

Tables, the engine and its transactions live here; `ledger` asks and writes the rows. Bytes of adapters
and bundles do not belong here (`blobs`). Every time is a UTC ISO string of one width: it sorts as text.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from soppu import user_ids
from soppu.errors import RegistryError, StorageError

SCHEMA_VERSION = 3
_OLDER = (1, 2)  # 1 had no placements, 2 no bases and no cores: nothing but tables came since
_BUSY_SECONDS = 30.0


def _name(length: int) -> sa.types.TypeEngine[str]:
    """A string compared byte by byte; MySQL alone would take 'Alice' and 'alice' for one user."""
    exact = mysql.VARCHAR(length, collation="utf8mb4_bin")
    return sa.String(length).with_variant(exact, "mysql", "mariadb")


class Base(DeclarativeBase):
    """The declarative base of every table of the catalogue."""


class SchemaRow(Base):
    """The one row that says which version of these tables a database holds, and tells it from any other."""

    __tablename__ = "soppu_schema"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]
    birth: Mapped[str] = mapped_column(sa.String(32))


class User(Base):
    """A user; `holding_id` is the newest row of `Holding`, None once the user is forgotten."""

    __tablename__ = "soppu_users"
    id: Mapped[str] = mapped_column(_name(128), primary_key=True)
    holding_id: Mapped[int | None]
    created_at: Mapped[str] = mapped_column(sa.String(32))
    forgotten_at: Mapped[str | None] = mapped_column(sa.String(32))


class Adapter(Base):
    """A stored adapter; its blob may be deleted only under a lock on this row.

    `kind` is "lora", or "core", which has a row of `Core` too. `state` is "stored", "removing" (nobody holds
    it, the blob is still there) or "removed". `removals` counts deletions of the blob: a writer that finds it
    changed has to write again.
    """

    __tablename__ = "soppu_adapters"
    id: Mapped[str] = mapped_column(_name(18), primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(16))
    content: Mapped[str] = mapped_column(sa.String(64))
    base_model: Mapped[str] = mapped_column(sa.Text)
    base_hash: Mapped[str] = mapped_column(sa.String(64))
    state: Mapped[str] = mapped_column(sa.String(16))
    removals: Mapped[int]
    created_at: Mapped[str] = mapped_column(sa.String(32))


class Basis(Base):
    """A stored basis that cores are told in. It is never removed: what is everybody's names nobody."""

    __tablename__ = "soppu_bases"
    id: Mapped[str] = mapped_column(_name(18), primary_key=True)
    content: Mapped[str] = mapped_column(sa.String(64))
    base_model: Mapped[str] = mapped_column(sa.Text)
    base_hash: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[str] = mapped_column(sa.String(32))


class BasisUse(Base):
    """The history: from `at` on this basis was in force for its base model, until the next of that model."""

    __tablename__ = "soppu_basis_uses"
    id: Mapped[int] = mapped_column(primary_key=True)
    basis_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_bases.id"), index=True)
    at: Mapped[str] = mapped_column(sa.String(32))


class Core(Base):
    """The basis that an adapter of the kind "core" is told in; it stays as long as the row is there."""

    __tablename__ = "soppu_cores"
    adapter_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_adapters.id"), primary_key=True)
    basis_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_bases.id"), index=True)


class Holding(Base):
    """The history: from `at` on this adapter was the user's current one, until the user's next row."""

    __tablename__ = "soppu_holdings"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_users.id"), index=True)
    adapter_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_adapters.id"), index=True)
    run: Mapped[str] = mapped_column(sa.Text)
    metrics: Mapped[dict[str, float]] = mapped_column(sa.JSON)
    at: Mapped[str] = mapped_column(sa.String(32))


class AdapterSet(Base):
    """A frozen choice of one adapter for each of its users."""

    __tablename__ = "soppu_sets"
    id: Mapped[str] = mapped_column(_name(18), primary_key=True)
    contains_forgotten: Mapped[bool]
    created_at: Mapped[str] = mapped_column(sa.String(32))


class SetMember(Base):
    """One user's adapter in one set."""

    __tablename__ = "soppu_set_members"
    set_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_sets.id"), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_users.id"), primary_key=True, index=True)
    adapter_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_adapters.id"), index=True)


class Bundle(Base):
    """A stored bundle and the set it was compressed from; whether one of its users was forgotten since."""

    __tablename__ = "soppu_bundles"
    id: Mapped[str] = mapped_column(_name(64), primary_key=True)
    set_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_sets.id"), index=True)
    run: Mapped[str] = mapped_column(sa.Text)
    contains_forgotten: Mapped[bool]
    created_at: Mapped[str] = mapped_column(sa.String(32))


class Publication(Base):
    """One switch of one serving target to a bundle; the newest row of a target and URL is in force."""

    __tablename__ = "soppu_publications"
    id: Mapped[int] = mapped_column(primary_key=True)
    target: Mapped[str] = mapped_column(_name(255), index=True)
    url: Mapped[str] = mapped_column(sa.Text)
    bundle_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_bundles.id"))
    at: Mapped[str] = mapped_column(sa.String(32))

    @property
    def place(self) -> str:
        """Target and URL in one string, for people."""
        return f"{self.target} {self.url}".strip()


class Placement(Base):
    """By what id a user is asked for since a publication, where a server has no user names of its own."""

    __tablename__ = "soppu_placements"
    publication_id: Mapped[int] = mapped_column(sa.ForeignKey("soppu_publications.id"), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("soppu_users.id"), primary_key=True, index=True)
    asked_as: Mapped[str] = mapped_column(sa.Text)


def now() -> str:
    """The time in UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def check_user_id(user: str) -> str:
    """Give `user` back if it can be a user id.

    "@" is left out because serving reads "user@version"; a leading dot because ids may become file names.

    Raises:
        RegistryError: it is none that `soppu.user_ids` gives.
    """
    if not user_ids.is_id(user):
        shown = user if len(user) <= 140 else f"{user[:140]}..."
        raise RegistryError(f"user id {shown!r} is not valid: {user_ids.ALLOWED}")
    return user


def insert_if_absent(session: Session, table: type[Base], **values: Any) -> bool:
    """Insert a row unless its key is taken; True if this call inserted it.

    A savepoint and the database's own uniqueness check: the one form of upsert that every database has.
    """
    try:
        with session.begin_nested():
            session.execute(sa.insert(table).values(**values))
    except IntegrityError:
        key = tuple(values.get(column.name) for column in sa.inspect(table).primary_key)
        if session.get(table, key, with_for_update=True) is None:
            raise
        return False
    return True


class Catalogue:
    """A database with the tables above. `read()` and `write()` give a session each, one transaction long."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        # Only SQLite looks at this option: a transaction that will write takes the write lock first.
        self._writer = engine.execution_options(soppu_immediate=True)
        self.name = engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, url: str | sa.URL, *, create: bool = True) -> Catalogue:
        """Connect, create the tables where there are none, and check their version.

        Args:
            url: a SQLAlchemy URL. SQLite runs in WAL mode with a 30 s busy timeout, so that processes on one
                machine can share the file; across machines use a database server.
            create: False refuses a database that holds no catalogue.

        Raises:
            RegistryError: no driver, no connection, no catalogue, or one of a newer SOPPU.
        """
        try:
            parsed = sa.make_url(url)
            in_file = parsed.get_backend_name() == "sqlite"  # connecting would create it
            if not create and in_file and not Path(parsed.database or "").is_file():
                raise RegistryError(f"catalogue {parsed.database}: there is no registry")
            catalogue = cls(_engine(parsed))
        except (SQLAlchemyError, ImportError) as error:
            # Without the URL, which may hold a password.
            raise RegistryError(f"catalogue URL cannot be used: {error}") from error
        if catalogue._version() is None:
            if not create:
                raise RegistryError(f"catalogue {catalogue.name}: holds no SOPPU registry")
            catalogue._create()
        if catalogue._version() in _OLDER:
            catalogue._upgrade()
        if (found := catalogue._version()) != SCHEMA_VERSION:
            raise RegistryError(
                f"catalogue {catalogue.name}: schema version {found}, this SOPPU knows {SCHEMA_VERSION}: "
                "use the SOPPU that wrote it, or a newer one"
            )
        return catalogue

    @property
    def file(self) -> str:
        """The file of a SQLite database; "" of any other."""
        url = self._engine.url
        return (url.database or "") if url.get_backend_name() == "sqlite" else ""

    def close(self) -> None:
        """Let go of every connection."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session to read in. RegistryError if the database fails, StorageError if it is for the disk."""
        try:
            with Session(self._engine) as session:
                yield session
        except SQLAlchemyError as error:
            kind = StorageError if _disk_refused(error) else RegistryError
            raise kind(f"catalogue {self.name}: {_reason(error)}") from error

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end, or leaves everything as it was. StorageError if it cannot."""
        try:
            with Session(self._writer, expire_on_commit=False) as session, session.begin():
                yield session
        except SQLAlchemyError as error:
            raise StorageError(f"catalogue {self.name}: nothing was changed: {_reason(error)}") from error

    def scrub(self) -> None:
        """Take what was deleted out of SQLite's write-ahead log too, unless a reader still needs it."""
        if self._engine.dialect.name == "sqlite":
            with self.read() as session:
                session.connection().exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def _version(self) -> int | None:
        with self.read() as session:
            if not sa.inspect(session.connection()).has_table(SchemaRow.__tablename__):
                return None
            return session.scalar(sa.select(SchemaRow.version))

    def _create(self) -> None:
        with self._unless_another_was_faster(), self.write() as session:
            Base.metadata.create_all(session.connection())
            insert_if_absent(session, SchemaRow, id=1, version=SCHEMA_VERSION, birth=uuid.uuid4().hex)

    def _upgrade(self) -> None:
        """Make the tables that an older version had not; no row of those it had is touched."""
        with self._unless_another_was_faster(), self.write() as session:
            Base.metadata.create_all(session.connection())
            session.execute(sa.update(SchemaRow).values(version=SCHEMA_VERSION))

    @contextmanager
    def _unless_another_was_faster(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            # Two processes may make the tables at once; the slower one fails and finds them there.
            if self._version() != SCHEMA_VERSION:
                raise


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error)


def _disk_refused(error: SQLAlchemyError) -> bool:
    # Even a reader has to write a little, next to a SQLite file that nobody has open.
    name = getattr(error.orig, "sqlite_errorname", "") if isinstance(error, DBAPIError) else ""
    return str(name).startswith(("SQLITE_IOERR", "SQLITE_FULL"))


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    if url.database in (None, "", ":memory:"):
        raise RegistryError(f"catalogue {url}: lives in memory only; name a file (sqlite:///folder/file.db)")
    # Idle connections are kept: the last one to close takes SQLite's shared memory file away, and a full disk
    # would then refuse even to read.
    engine = sa.create_engine(url, max_overflow=-1, connect_args={"timeout": _BUSY_SECONDS})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "checkout", _refuse_inherited)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, record: sa.pool.ConnectionPoolEntry) -> None:
    record.info["pid"] = os.getpid()
    connection.isolation_level = None  # the driver begins nothing by itself: _begin_sqlite does
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA secure_delete=ON")  # what a user asked to forget is overwritten, not unlinked
    deadline = time.monotonic() + _BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # SQLite's busy timeout does not cover this switch, which every process may try at first.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _refuse_inherited(_: object, record: Any, proxy: Any) -> None:
    # SQLite forbids the use of a connection across a fork; this makes the pool open another.
    if record.info["pid"] != os.getpid():
        record.dbapi_connection = proxy.dbapi_connection = None
        raise sa.exc.DisconnectionError(f"opened by process {record.info['pid']}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that reads first and writes later fails at once if another one wrote between.
    immediate = connection.get_execution_options().get("soppu_immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
