"""Whose text is whose; what one user's fault is to the others; and what reading costs."""

from __future__ import annotations

import gzip
import json
import os
import unicodedata
from pathlib import Path

import pytest

from soppu import data
from soppu.errors import DataError
from tests.soppu.data.conftest import Counter, pairs, settings_of, write_rows


def test_a_folder_of_files_is_a_file_a_user_where_no_column_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "alice.txt").write_text("a\n\n" * 900)
    write_rows(tmp_path / "bob@example.com.jsonl", [{"text": f"b{n}"} for n in range(3)])
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    assert data.list_users(settings_of(tmp_path)) == ["alice", "bob%40example.com"]
    assert data.load_user(settings_of(tmp_path), "bob@example.com").user_id == "bob%40example.com"


def test_subfolders_are_users_and_hold_what_they_like(tmp_path: Path) -> None:
    write_rows(tmp_path / "alice" / "deep" / "one.jsonl", [{"text": "1"}, {"text": "2"}])
    (tmp_path / "alice" / "two.txt").write_text("3")
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "x.csv").write_text("text\nfour\nfive\n")
    (tmp_path / "empty").mkdir()
    config = settings_of(tmp_path)
    assert data.list_users(config) == ["alice", "bob"]
    found = data.load_user(config, "alice")
    assert {item.completion for item in found.examples} == {"1", "2", "3"}


def test_a_single_file_is_the_one_users_who_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "notes.jsonl", [{"text": f"n{n}"} for n in range(3)])
    assert data.load_user(settings_of(path, users=("alice",)), "alice").user_id == "alice"
    with pytest.raises(DataError, match="lacks the text key user_id"):
        data.list_users(settings_of(path))
    asked = data.load_user(settings_of(path), "alice")  # a client is told its own name alone
    assert asked == data.load_user(settings_of(path, users=("alice",)), "alice")
    path = tmp_path / "diary.txt"
    path.write_text("Dear diary.")
    assert data.list_users(settings_of(path)) == ["diary"]
    assert data.list_users(settings_of(path, users=("alice",))) == ["alice"]


def test_a_row_of_another_user_in_a_users_file_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "alice.jsonl", [*pairs("alice", 3), *pairs("bob", 1)])
    with pytest.raises(DataError, match=r"alice\.jsonl:4: names user 'bob'.*data\.user_from"):
        data.load_user(settings_of(tmp_path, user_from="file"), "alice")
    kept = data.load_user(settings_of(tmp_path, user_from="file", user_column=""), "alice")
    assert len(kept.examples) == 4
    (tmp_path / "carol.txt").write_text("x")  # now by file, since plain text names nobody
    with pytest.raises(DataError, match=r"alice\.jsonl:4: names user 'bob'"):
        data.load_user(settings_of(tmp_path), "alice")


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("alice.txt", "alice.jsonl"),
        ("alice@x.txt", "alice%40x.txt"),
        (unicodedata.normalize("NFC", "zoë") + ".txt", unicodedata.normalize("NFD", "zoë") + ".txt"),
    ],
)
def test_two_files_of_one_id_are_both_named(one: str, two: str, tmp_path: Path) -> None:
    for name in (one, two, "dave.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n')
    with pytest.raises(DataError, match="both are of user") as caught:
        data.list_users(settings_of(tmp_path))
    assert one in str(caught.value) and two in str(caught.value)
    assert data.list_users(settings_of(tmp_path, users=("dave",))) == ["dave"]


def test_two_names_of_one_id_in_a_column_are_both_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [*pairs("a@x", 2), *pairs("a%40x", 2), *pairs("b", 2)])
    with pytest.raises(DataError, match="'a@x' and 'a%40x' are one id, a%40x"):
        data.list_users(settings_of(path))


def test_a_name_with_a_control_character_is_refused_by_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [*pairs("b", 3), *pairs("a\u202eb", 2)])
    with pytest.raises(DataError, match=r"x\.jsonl:4: .*U\+202E \(RIGHT-TO-LEFT OVERRIDE\) at 1"):
        data.list_users(settings_of(path))
    assert data.list_users(settings_of(path, on_small_user="leave-out")) == ["a\u202eb", "b"]
    with pytest.raises(DataError, match="RIGHT-TO-LEFT"):
        data.load_user(settings_of(path, on_small_user="leave-out"), "a\u202eb")


# ---- one user's fault


def _faulty(folder: Path) -> dict[str, str]:
    """A file a user, each with a fault of its own but for two; user -> what is said."""
    for user in ("alice", "zoe"):
        write_rows(folder / f"{user}.jsonl", pairs(user, 8))
    (folder / "empty.jsonl").write_text("\n")
    write_rows(folder / "twice.jsonl", pairs("twice", 1) * 9)
    (folder / "broken.jsonl").write_text(json.dumps(pairs("broken")[0]) + "\n{")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(pairs("cut")[0]).encode() * 99)[:-9])
    write_rows(folder / "bad.jsonl", [*pairs("bad", 8), {"user_id": "bad", "prompt": "p", "completion": ""}])
    return {
        "empty": "user without examples",
        "twice": "has 0 examples to train on",
        "broken": r"broken\.jsonl:2: not JSON",
        "cut": "not whole as gzip",
        "bad": "completion is empty",
    }


def test_a_users_own_fault_is_that_users_alone(tmp_path: Path) -> None:
    faults = _faulty(tmp_path)
    with pytest.raises(DataError):
        data.list_users(settings_of(tmp_path))
    lenient = settings_of(tmp_path, on_small_user="leave-out")
    assert data.list_users(lenient) == sorted(["alice", "zoe", *faults])
    for user, said in faults.items():
        with pytest.raises(DataError, match=said):
            data.load_user(lenient, user)
    for user in ("alice", "zoe"):
        assert len(data.load_user(lenient, user).examples) == 8
        assert data.list_users(settings_of(tmp_path, users=(user,))) == [user]


@pytest.mark.parametrize("user_from", ["column", "file"])
def test_a_file_that_cannot_be_read_is_its_users_fault(user_from: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "alice.jsonl", pairs("alice"))
    (tmp_path / "bob.jsonl").symlink_to(tmp_path / "gone.jsonl")
    lenient = settings_of(tmp_path, on_small_user="leave-out", user_from=user_from)
    assert data.list_users(lenient) == ["alice", "bob"]
    with pytest.raises(DataError, match=r"bob\.jsonl: (cannot be read: No such|no such) file"):
        data.load_user(lenient, "bob")
    assert data.load_user(lenient, "alice").train


def test_a_shard_that_breaks_off_is_everybodys_fault(tmp_path: Path) -> None:
    """Nobody can say whose rows are missing from it."""
    write_rows(tmp_path / "part-0.jsonl", [*pairs("alice"), *pairs("bob")])
    path = write_rows(tmp_path / "part-1.jsonl", [*pairs("carol")])
    path.write_text(path.read_text()[:-5])
    with pytest.raises(DataError, match=r"part-1\.jsonl:6: not JSON"):
        data.list_users(settings_of(tmp_path, on_small_user="leave-out"))


# ---- what changes, and what it costs


def test_text_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "alice.jsonl", pairs("alice", 9))
    write_rows(tmp_path / "bob.jsonl", pairs("bob", 9))
    for config in (settings_of(tmp_path), settings_of(tmp_path, user_from="file"), settings_of(path)):
        before = data.load_user(config, "alice"), data.source_digest(config.source)
        text = path.read_text()
        state = path.stat()
        path.write_text(text.replace("answer 3", "answer X"))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # of the same size and time
        assert data.load_user(config, "alice") != before[0] and data.source_digest(config.source) != before[1]
        path.write_text(text)
        assert (data.load_user(config, "alice"), data.source_digest(config.source)) == before


def test_a_user_who_comes_or_goes_is_noticed(tmp_path: Path) -> None:
    for user_from in ("auto", "file"):
        config = settings_of(tmp_path, user_from=user_from)
        write_rows(tmp_path / "alice.jsonl", pairs("alice"))
        assert data.list_users(config) == ["alice"]
        digest = data.source_digest(config.source)
        write_rows(tmp_path / "bob.jsonl", pairs("bob"))
        assert data.list_users(config) == ["alice", "bob"]
        assert data.source_digest(config.source) != digest
        (tmp_path / "bob.jsonl").unlink()
        assert data.list_users(config) == ["alice"]
        assert data.source_digest(config.source) == digest


USERS = 150  # more than any cache of files holds


@pytest.mark.parametrize("user_from", ["column", "file", "folder"])
def test_reading_everybody_opens_each_file_a_few_times(
    user_from: str, tmp_path: Path, counter: Counter
) -> None:
    names = [f"u{n}" for n in range(USERS)]
    for name in names:
        place = f"{name}/x.jsonl" if user_from == "folder" else f"{name}.jsonl"
        write_rows(tmp_path / place, pairs(name))
    config = settings_of(tmp_path, user_from=user_from)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
    with counter.counting(tmp_path) as counted:
        assert data.list_users(config) == sorted(names)
        listed = len(counted.opened)
        for name in names:
            data.load_user(config, name)
    assert listed == (USERS if user_from == "column" else 0)
    assert len([name for name in counted.opened if name.endswith(".jsonl")]) == listed + USERS
    assert counted.read < 2 * total + 500_000
    with counter.counting(tmp_path) as counted:
        data.load_user(config, "u7")
    assert [name for name in counted.opened if name.endswith("l")] == [
        "x.jsonl" if user_from == "folder" else "u7.jsonl"
    ]


@pytest.mark.parametrize("name", ["all.jsonl", "all.json", "all.jsonl.gz"])
def test_one_users_rows_of_a_large_file_are_read_alone(name: str, tmp_path: Path, counter: Counter) -> None:
    rows = [row for n in range(200) for row in pairs(f"u{n}", 4, more="x" * 2000)]
    text = json.dumps(rows) if name == "all.json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    config = settings_of(path)
    assert len(data.list_users(config)) == 200
    with counter.counting(tmp_path) as counted:
        for n in range(200):
            assert data.load_user(config, f"u{n}").train
    assert counted.read < 2 * len(text)
    assert len(counted.opened) == (200 if name == "all.jsonl" else 0)


def test_the_digest_of_a_source_reads_a_file_once(tmp_path: Path, counter: Counter) -> None:
    for n in range(20):
        path = write_rows(tmp_path / f"u{n}.jsonl", pairs(f"u{n}"))
        os.utime(path, (1, 1))
    import time

    time.sleep(0.15)  # a file that was changed just now is not remembered
    before = data.source_digest(str(tmp_path))
    with counter.counting(tmp_path) as counted:
        assert data.source_digest(str(tmp_path)) == before
    assert not [name for name in counted.opened if name.endswith(".jsonl")]
    (tmp_path / "u3.jsonl").write_text("changed")
    with counter.counting(tmp_path) as counted:
        assert data.source_digest(str(tmp_path)) != before
    assert [name for name in counted.opened if name.endswith(".jsonl")] == ["u3.jsonl"]


def test_a_message_about_many_users_names_some(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [row for n in range(50) for row in pairs(f"u{n:02}", 2)])
    with pytest.raises(DataError, match="it has u00, u01, .*, u19 and 30 more$"):
        data.load_user(settings_of(path), "nobody")
