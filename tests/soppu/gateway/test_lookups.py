"""What is kept of the catalogue is forgotten at the first change of it, by whichever process."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soppu.errors import RegistryError
from soppu.gateway.keys import KeyStore, digest_of
from soppu.gateway.lookups import Lookups
from soppu.registry import Registry


def test_an_answer_is_kept_until_anybody_changes_anything(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "a ?%20b")
    keys, asked = KeyStore(registry.catalogue), list[str]()
    text, key = keys.create("alice")
    _, other = keys.create("bob")

    def find(digest: str) -> object:
        asked.append(digest)
        return keys.by_digest(digest)

    async def main() -> None:
        lookups, digest = Lookups(registry.catalogue), digest_of(text)
        for _ in range(5):
            assert await lookups.do(find, digest) == key
        assert len(asked) == 1
        for _ in range(3):
            assert await lookups.do(find, "0" * 64) is None  # what is not there may come
        assert len(asked) == 4
        keys.revoke(key_id=other.id)
        assert await lookups.do(find, digest) == key and len(asked) == 5
        words = [
            sys.executable,
            "-m",
            "soppu.cli",
            "keys",
            "revoke",
            key.id,
            "--registry",
            str(tmp_path / "a ?%20b"),
        ]
        await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)
        assert await lookups.do(find, digest) is None
        lookups.close()

    asyncio.run(main())
    registry.close()


def test_a_change_under_way_is_not_kept_for_later(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    keys = KeyStore(registry.catalogue)
    text, key = keys.create("alice")

    def find_and_then_revoke(digest: str) -> object:
        found = keys.by_digest(digest)
        keys.revoke(key_id=key.id)  # as another process, right after it was read
        return found

    async def main() -> None:
        lookups = Lookups(registry.catalogue)
        assert await lookups.do(find_and_then_revoke, digest_of(text)) == key
        assert await lookups.do(find_and_then_revoke, digest_of(text)) is None
        lookups.close()

    asyncio.run(main())
    registry.close()


def test_another_file_in_its_place_and_none_at_all_are_seen(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    keys = KeyStore(registry.catalogue)
    text, key = keys.create("alice")
    registry.close()
    path = tmp_path / "registry" / "catalogue.db"
    shutil.copy(path, tmp_path / "before.db")
    keys.revoke(key_id=key.id)
    registry.close()

    async def main() -> None:
        lookups, digest = Lookups(registry.catalogue), digest_of(text)
        assert await lookups.do(keys.by_digest, digest) is None
        registry.close()
        (tmp_path / "before.db").replace(path)  # as who restores a copy
        assert await lookups.do(keys.by_digest, digest) == key
        path.unlink()
        with pytest.raises(RegistryError, match="catalogue"):
            await lookups.do(keys.by_digest, digest)
        lookups.close()

    asyncio.run(main())
    registry.close()
