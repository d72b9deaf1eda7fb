"""Keys: random, shown once, kept as a hash, revocable at once."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soppu.cli import main
from soppu.errors import NotThere, RegistryError
from soppu.gateway.keys import KeyStore, digest_of
from soppu.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry")


def soppu(registry: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["keys", *words, "--registry", str(registry)])


def test_a_key_is_found_by_its_text_alone_until_it_is_revoked(registry: Registry) -> None:
    keys = KeyStore(registry.catalogue)
    text, key = keys.create("alice", note="laptop")
    other, _ = keys.create("alice")
    assert text != other and len(text) > len("soppu_user_") + 40
    assert keys.find(text) == key and key.user == "alice" and not key.admin
    for wrong in (
        text[:-1],
        text + "A",
        text.upper(),
        text.replace("user", "admin"),
        "",
        "soppu_",
        "x" * 10**6,
    ):
        assert keys.find(wrong) is None
    assert KeyStore(registry.catalogue).find(text) == key  # another process has the same
    assert keys.revoke(key_id=key.id) == 1 and keys.revoke(key_id=key.id) == 0
    assert keys.find(text) is None and keys.find(other) is not None
    assert keys.revoke(user="alice") == 1 and keys.find(other) is None
    assert [row.revoked_at is not None for row in keys.every()] == [True, True]


def test_the_database_holds_no_key(registry: Registry, tmp_path: Path) -> None:
    text, _ = KeyStore(registry.catalogue).create("alice")
    registry.close()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "registry").glob("catalogue.db*"))
    secret = text.removeprefix("soppu_user_")  # may have any number of "_" in it
    assert len(secret) > 40 and secret.encode() not in stored
    assert digest_of(text).encode() in stored


def test_a_key_of_days_ends(registry: Registry) -> None:
    keys = KeyStore(registry.catalogue)
    text, key = keys.create("alice", days=1e-9)
    assert key.expires_at is not None and keys.find(text) is None
    assert keys.find(keys.create("alice", days=1)[0]) is not None


def test_a_key_is_of_a_user_or_of_an_admin(registry: Registry) -> None:
    keys = KeyStore(registry.catalogue)
    for wrong in ({"user": "alice", "admin": True}, {}):
        with pytest.raises(RegistryError, match="exactly one"):
            keys.create(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match="not valid"):
        keys.create("alice@0f3c")
    with pytest.raises(NotThere, match="no key 'k-1'"):
        keys.revoke(key_id="k-1")
    assert keys.every() == ()


def test_processes_that_begin_at_once_make_one_table(registry: Registry) -> None:
    faults: list[Exception] = []

    def begin() -> None:
        try:
            KeyStore(registry.catalogue).create("alice")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(KeyStore(registry.catalogue).every()) == 8


def test_the_commands_make_list_and_revoke(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    Registry.open(root).close()
    assert soppu(root, "list").output == "no keys yet\n"
    made = soppu(root, "create", "alice@example.com", "--note", "laptop", "--days", "30")
    text = made.stdout.strip()
    assert re.fullmatch(r"soppu_user_[\w-]{43}", text), made.output
    assert "served nowhere yet" in made.stderr
    assert soppu(root, "create", "--admin").stdout.startswith("soppu_admin_")
    listed = soppu(root, "list", "--json", "--user", "alice@example.com")
    (row,) = json.loads(listed.stdout)
    assert row["user"] == "alice%40example.com" and row["note"] == "laptop" and text not in listed.output
    shown = soppu(root, "list").output
    assert row["id"] in shown and "(admin)" in shown and text not in shown
    assert soppu(root, "revoke", row["id"]).output == "revoked 1\n"
    assert soppu(root, "revoke", row["id"]).output == "was revoked already\n"
    assert "revoked" in soppu(root, "list").output
    assert KeyStore(Registry.open(root).catalogue).find(text) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create"], "name a USER, or --admin"),
        (["create", "alice", "--admin"], "name a USER, or --admin"),
        (["create", "al\nice"], "cannot be in a name"),
        (["create", "alice", "--days", "0"], "0"),
        (["revoke"], "name a KEY, or --user USER"),
        (["revoke", "k-1", "--user", "alice"], "name a KEY, or --user USER"),
        (["revoke", "k-1"], "there is no key 'k-1'"),
        (["revoke", "--user", "bob"], "user 'bob' has no key"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, words: list[str], said: str) -> None:
    Registry.open(tmp_path / "registry").close()
    result = soppu(tmp_path / "registry", *words)
    assert result.exit_code in (1, 2) and said in result.output
