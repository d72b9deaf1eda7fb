"""The catalogue: user ids, its version, its transactions, and what a broken database says."""

from __future__ import annotations

import multiprocessing
import sqlite3
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from soppu.errors import RegistryError, StorageError
from soppu.registry.catalogue import (
    SCHEMA_VERSION,
    Catalogue,
    Holding,
    Placement,
    SchemaRow,
    User,
    check_user_id,
    insert_if_absent,
    now,
)

ALPHABET = string.ascii_letters + string.digits + "._-"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/c.db"


@pytest.fixture
def catalogue(url: str) -> Iterator[Catalogue]:
    opened = Catalogue.open(url)
    yield opened
    opened.close()


def add_user(catalogue: Catalogue, name: str) -> bool:
    with catalogue.write() as session:
        return insert_if_absent(session, User, id=name, created_at=now())


def names(catalogue: Catalogue) -> set[str]:
    with catalogue.read() as session:
        return set(session.scalars(sa.select(User.id)))


@given(st.text(max_size=140) | st.text(ALPHABET, max_size=130))
def test_user_ids(user: str) -> None:
    valid = 1 <= len(user) <= 128 and set(user) <= set(ALPHABET) and user[0] != "."
    if valid:
        assert check_user_id(user) == user
    else:
        with pytest.raises(RegistryError, match="A-Z a-z, digits 0-9"):
            check_user_id(user)


@pytest.mark.parametrize("user", ["alice@2", "../up", "al ice", "alice\n", "ålice", "", ".hidden", "٣"])
def test_user_ids_that_would_be_mistaken_for_something_else(user: str) -> None:
    with pytest.raises(RegistryError) as caught:
        check_user_id(user)
    assert repr(user) in str(caught.value)


def test_times_are_utc_and_sort_as_text() -> None:
    times = [now() for _ in range(50)]
    assert times == sorted(times)
    assert {len(one) for one in times} == {32}
    assert datetime.fromisoformat(times[0]).utcoffset().total_seconds() == 0  # type: ignore[union-attr]


def test_sqlite_is_opened_for_several_processes(catalogue: Catalogue, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with catalogue.read() as session:
        assert session.scalar(sa.text("PRAGMA busy_timeout")) == 30_000
        assert session.scalar(sa.text("PRAGMA foreign_keys")) == 1


def test_opening_again_keeps_what_is_there(catalogue: Catalogue, url: str) -> None:
    add_user(catalogue, "alice")
    assert names(Catalogue.open(url)) == {"alice"}


def test_an_older_schema_gets_what_it_lacks_and_keeps_what_it_has(catalogue: Catalogue, url: str) -> None:
    add_user(catalogue, "alice")
    with catalogue.write() as session:
        session.execute(sa.text("DROP TABLE soppu_placements"))
        session.execute(sa.update(SchemaRow).values(version=1))
    catalogue.close()
    again = Catalogue.open(url)
    assert names(again) == {"alice"}
    with again.read() as session:
        assert session.scalars(sa.select(Placement)).all() == []
        assert session.scalar(sa.select(SchemaRow.version)) == SCHEMA_VERSION
    again.close()
    assert names(Catalogue.open(url)) == {"alice"}


def test_a_newer_schema_is_refused_and_left_alone(catalogue: Catalogue, url: str, tmp_path: Path) -> None:
    add_user(catalogue, "alice")
    with catalogue.write() as session:
        session.execute(sa.update(SchemaRow).values(version=9))
    catalogue.close()
    before = (tmp_path / "c.db").read_bytes()
    with pytest.raises(RegistryError, match=rf"c\.db: schema version 9, this SOPPU knows {SCHEMA_VERSION}"):
        Catalogue.open(url)
    assert (tmp_path / "c.db").read_bytes() == before


def test_a_database_of_somebody_else_is_joined_only_to_write(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c.db") as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(RegistryError, match="holds no SOPPU registry"):
        Catalogue.open(f"sqlite:///{tmp_path}/c.db", create=False)
    assert names(Catalogue.open(f"sqlite:///{tmp_path}/c.db")) == set()


def test_urls_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at " * 20)
    for url, message in [
        ("sqlite://", "memory only"),
        ("sqlite:///:memory:", "memory only"),
        (f"sqlite:///{tmp_path}/text.db", "not a database"),
        (f"sqlite:///{tmp_path}/no/c.db", "unable to open"),
        ("nosuch://x", "nosuch"),
        ("no url at all", "parse"),
    ]:
        with pytest.raises(RegistryError, match=message):
            Catalogue.open(url)


def test_a_password_never_reaches_a_message() -> None:
    for url in ("nosuch://me:hunter2@host/db", "postgresql+nosuch://me:hunter2@host/db", "me:hunter2@host"):
        with pytest.raises(RegistryError) as caught:
            Catalogue.open(url)
        assert "hunter2" not in str(caught.value)


def test_a_failed_transaction_changes_nothing(catalogue: Catalogue) -> None:
    add_user(catalogue, "alice")
    with pytest.raises(KeyError), catalogue.write() as session:
        session.add(User(id="bob", created_at=now()))
        session.flush()
        raise KeyError("stop")
    with pytest.raises(StorageError, match="nothing was changed"), catalogue.write() as session:
        session.add(User(id="carol", created_at=now()))
        session.execute(sa.text("INSERT INTO nowhere VALUES (1)"))
    assert names(catalogue) == {"alice"}


def test_insert_if_absent_reads_what_is_there_and_hides_no_other_fault(catalogue: Catalogue) -> None:
    assert add_user(catalogue, "alice")
    with catalogue.write() as session:
        assert not insert_if_absent(session, User, id="alice", created_at="later")
        assert session.get_one(User, "alice").created_at != "later"
        assert insert_if_absent(session, User, id="bob", created_at=now())  # the savepoint left it usable
    orphan = {"id": 1, "user_id": "nobody", "adapter_id": "a-0", "run": "", "metrics": {}, "at": now()}
    with catalogue.write() as session, pytest.raises(IntegrityError):
        insert_if_absent(session, Holding, **orphan)
    assert names(catalogue) == {"alice", "bob"}


def test_writers_that_read_first_wait_for_each_other(catalogue: Catalogue) -> None:
    add_user(catalogue, "counter")

    def count(_: int) -> None:
        with catalogue.write() as session:
            row = session.get_one(User, "counter", with_for_update=True)
            row.holding_id = (row.holding_id or 0) + 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(80)))
    with catalogue.read() as session:
        assert session.get_one(User, "counter").holding_id == 80


def test_many_may_create_the_same_catalogue_at_once(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: Catalogue.open(url), range(16)))
    for number, catalogue in enumerate(opened):
        add_user(catalogue, f"user-{number}")
    assert len(names(opened[0])) == 16


def _add_in_child(catalogue: Catalogue, name: str) -> None:
    add_user(catalogue, name)


def test_a_catalogue_opened_before_a_fork_works_on_both_sides(catalogue: Catalogue) -> None:
    add_user(catalogue, "before")
    child = multiprocessing.get_context("fork").Process(target=_add_in_child, args=(catalogue, "child"))
    child.start()
    add_user(catalogue, "parent")
    child.join(30)
    assert child.exitcode == 0
    assert names(catalogue) == {"before", "child", "parent"}


def test_what_was_deleted_can_be_scrubbed_from_the_files(catalogue: Catalogue, tmp_path: Path) -> None:
    add_user(catalogue, "a-name-to-forget")
    with catalogue.write() as session:
        session.execute(sa.delete(User))
    catalogue.scrub()
    data = b"".join((tmp_path / name).read_bytes() for name in ("c.db", "c.db-wal"))
    assert b"a-name-to-forget" not in data


def test_ids_are_compared_byte_by_byte_on_every_database(catalogue: Catalogue) -> None:
    assert add_user(catalogue, "Alice")
    assert add_user(catalogue, "alice")
    on_mysql = str(CreateTable(User.__table__).compile(dialect=mysql.dialect()))  # type: ignore[arg-type]
    assert "id VARCHAR(128) COLLATE utf8mb4_bin" in on_mysql
    on_postgres = str(CreateTable(User.__table__).compile(dialect=postgresql.dialect()))  # type: ignore[arg-type]
    assert "id VARCHAR(128) NOT NULL" in on_postgres
