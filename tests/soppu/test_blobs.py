"""Blobs appear whole or not at all; a remote root is what counts, its copies are checked on every use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from soppu.blobs import Blobs, RemoteBlobs, open_blobs
from soppu.errors import RegistryError, StorageError
from tests.share import ShareFileSystem, share

KEY = "adapters/a-1"


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteBlobs]:
    blobs = open_blobs(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    assert isinstance(blobs, RemoteBlobs)
    yield blobs
    if fsspec.filesystem("memory").exists(f"/{tmp_path.name}"):
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(b"1234")
    (folder / "soppu.json").write_text("{}")


def check(folder: Path) -> Path:
    if (found := (folder / "weights").read_bytes()) != b"1234":
        raise RegistryError(f"damaged: {found!r}")
    return folder


def remote_files(tmp_path: Path) -> dict[str, bytes]:
    system = fsspec.filesystem("memory")
    if not system.exists(f"/{tmp_path.name}"):
        return {}
    return {
        path.removeprefix(f"/{tmp_path.name}/"): system.cat(path) for path in system.find(f"/{tmp_path.name}")
    }


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_files_and_folders_go_in_and_come_out(tmp_path: Path, kind: str) -> None:
    root: str | Path = tmp_path / "root" if kind == "local" else f"memory://{tmp_path.name}"
    blobs: Blobs = open_blobs(root, cache=tmp_path / "cache")
    assert not blobs.has(KEY)
    blobs.put(KEY, fill, check)
    blobs.put("bundles/b", lambda path: path.write_bytes(b"xyz") and None, Path.read_bytes)
    assert blobs.has(KEY)
    assert blobs.size(f"{KEY}/weights") == 4
    assert sorted(path.name for path in blobs.fetch(KEY, check).iterdir()) == ["soppu.json", "weights"]
    assert blobs.fetch("bundles/b", Path.read_bytes) == b"xyz"
    blobs.remove(KEY)
    blobs.remove(KEY)
    assert not blobs.has(KEY)
    with pytest.raises(RegistryError, match=f"{KEY} is not in the store"):
        blobs.fetch(KEY, check)
    with pytest.raises(RegistryError, match=f"{KEY}/weights"):
        blobs.size(f"{KEY}/weights")


def test_what_fails_its_check_is_not_stored(tmp_path: Path, remote: RemoteBlobs) -> None:
    def wrong(folder: Path) -> None:
        fill(folder)
        (folder / "weights").write_bytes(b"0000")

    local = open_blobs(tmp_path / "root")
    for blobs in (local, remote):
        with pytest.raises(RegistryError, match="damaged"):
            blobs.put(KEY, wrong, check)
        assert not blobs.has(KEY)
    assert list((tmp_path / "root" / "adapters").iterdir()) == []
    assert remote_files(tmp_path) == {}


def test_a_damaged_copy_is_fetched_again_but_a_damaged_root_is_refused(
    tmp_path: Path, remote: RemoteBlobs
) -> None:
    remote.put(KEY, fill, check)
    copy = remote.fetch(KEY, check)
    assert copy == tmp_path / "cache" / KEY
    (copy / "weights").chmod(0o644)
    (copy / "weights").write_bytes(b"0000")
    assert (remote.fetch(KEY, check) / "weights").read_bytes() == b"1234"

    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{KEY}/weights", b"0000")
    (copy / "weights").chmod(0o644)
    (copy / "weights").write_bytes(b"9999")
    with pytest.raises(RegistryError, match="damaged: b'0000'"):
        remote.fetch(KEY, check)
    assert not copy.exists()
    with pytest.raises(RegistryError, match="damaged: b'0000'"):
        remote.put(KEY, fill, check)
    assert remote_files(tmp_path)[f"{KEY}/weights"] == b"0000"


@pytest.mark.parametrize("failing", [1, 2])
def test_an_upload_that_fails_is_not_seen_and_can_be_repeated(
    tmp_path: Path, remote: RemoteBlobs, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls = []
    whole = MemoryFileSystem.put_file

    def put_file(self: MemoryFileSystem, source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == failing:
            self.pipe(target, b"ha")
            raise ConnectionError("connection reset")
        whole(self, source, target)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with pytest.raises(StorageError, match=f"{KEY} was not written: connection reset"):
        remote.put(KEY, fill, check)
    assert not remote.has(KEY)
    assert not [name for name in remote_files(tmp_path) if ".tmp" in name]
    with pytest.raises(RegistryError, match="not in the store"):
        remote.fetch(KEY, check)
    remote.put(KEY, fill, check)
    assert remote_files(tmp_path) == {f"{KEY}/weights": b"1234", f"{KEY}/soppu.json": b"{}"}


def test_a_download_that_fails_leaves_no_copy(
    tmp_path: Path, remote: RemoteBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_file(self: MemoryFileSystem, source: str, target: str) -> None:
        raise ConnectionError("connection reset")

    remote.put(KEY, fill, check)
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with pytest.raises(RegistryError, match=f"{KEY} cannot be fetched: connection reset"):
        remote.fetch(KEY, check)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_removing_beside_somebody_who_removes_and_somebody_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs(share(tmp_path / "share"), cache=tmp_path / "cache")
    blobs.put(KEY, fill, check)
    looked = ShareFileSystem.find

    def find(self: ShareFileSystem, path: str) -> list[str]:
        found: list[str] = looked(self, path)
        (tmp_path / "share" / KEY / "weights").unlink()
        (tmp_path / "share" / KEY / ".weights.0123.tmp").write_bytes(b"12")
        return found

    monkeypatch.setattr(ShareFileSystem, "find", find)
    blobs.remove(KEY)
    assert not blobs.has(KEY)
    assert [path.name for path in (tmp_path / "share" / KEY).iterdir()] == [".weights.0123.tmp"]
    monkeypatch.setattr(ShareFileSystem, "find", looked)
    blobs.remove(KEY)
    assert not (tmp_path / "share" / KEY).exists()


def test_the_cache_of_a_root_is_always_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root = f"memory://{tmp_path.name}"
    open_blobs(root).put(KEY, fill, check)
    first = open_blobs(root).fetch(KEY, check)
    assert first == open_blobs(root).fetch(KEY, check)
    assert first.is_relative_to(tmp_path / "home" / "soppu" / "registry")
    open_blobs(f"{root}/other").put(KEY, fill, check)
    assert open_blobs(f"{root}/other").fetch(KEY, check) != first


def test_a_faster_writer_is_accepted_once_its_blob_is_checked(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path)

    def overtaken(folder: Path) -> None:
        fill(folder)
        fill(tmp_path / KEY)  # another process renames its own into place

    blobs.put(KEY, overtaken, check)
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["a-1"]

    def overtaken_by_damage(folder: Path) -> None:
        fill(folder)
        fill(tmp_path / "adapters/a-2")
        (tmp_path / "adapters/a-2" / "weights").write_bytes(b"0000")

    with pytest.raises(RegistryError, match="damaged: b'0000'"):
        blobs.put("adapters/a-2", overtaken_by_damage, check)
    assert (tmp_path / "adapters/a-2" / "weights").read_bytes() == b"0000"


def test_a_password_never_reaches_a_message() -> None:
    with pytest.raises(RegistryError, match=r"nosuch://me:\*\*\*@host/folder") as caught:
        open_blobs("nosuch://me:hunter2@host/folder")
    assert "hunter2" not in str(caught.value)
