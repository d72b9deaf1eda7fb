"""Publications that die or meet on one volume, and disks that are full or refuse: what is left of them."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.targets.lorax_volume import Volume
from tests.soppu.targets.volumes import (
    ONE,
    TWO,
    assert_same_change,
    content,
    open_volume,
    other,
    shared,
    stage,
)

__all__ = ["other", "shared"]


def test_a_sweep_deletes_leftovers_and_nothing_else(shared: Bundle, other: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    foreign = folder / "adapters/by-hand/adapter_config.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("{}")
    stage(volume, shared)
    before = content(folder)
    lost = stage(volume, other, TWO)
    (folder / f"bundles/{TWO}.json").unlink()
    (folder / ".staging/abc").mkdir()
    (folder / ".staging/abc/adapter_model.safetensors").write_bytes(b"half")
    (folder / f"bundles/.{TWO}.json.xyz.tmp").write_bytes(b"half")
    (folder / "basis/.abc.safetensors.xyz.tmp").write_bytes(b"half")
    (folder / "adapters/nobody").mkdir()
    assert set(volume.sweep()) == set(lost.values())
    assert content(folder) == before and not (folder / "adapters/nobody").exists()
    assert volume.sweep() == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"adapters": 3}', '{"adapters": {"a": 1}}', ""])
def test_where_a_manifest_is_damaged_nothing_is_swept(shared: Bundle, tmp_path: Path, text: str) -> None:
    volume, folder = open_volume(tmp_path)
    ids = stage(volume, shared)
    (folder / f"bundles/{TWO}.json").write_text(text)
    (folder / f"bundles/{ONE}.json").unlink()
    with pytest.raises(TargetError, match=rf"bundles/{TWO}.json is damaged; delete it"):
        volume.sweep()
    with pytest.raises(TargetError, match="is damaged"):
        volume.placements(TWO)
    assert all((folder / path).is_dir() for path in ids.values())


def test_two_stagings_at_once_end_as_one(shared: Bundle, other: Bundle, tmp_path: Path) -> None:
    _, folder = open_volume(tmp_path)

    def publish(which: tuple[Bundle, str]) -> dict[str, str]:
        volume = Volume.open(str(folder))
        ids = stage(volume, *which)
        volume.sweep()
        return ids

    with ThreadPoolExecutor(4) as pool:
        one, same, two, again = pool.map(publish, [(shared, ONE), (shared, ONE), (other, TWO), (other, TWO)])
    assert one == same and two == again
    for bundle, ids in ((shared, one), (other, two)):
        for user, path in ids.items():
            assert_same_change(folder / path, bundle, user)


def publisher(bundle: Bundle, folder: Path) -> int:
    """The pid of a copy of this process that stages, drops and sweeps for ever."""
    pid = os.fork()
    if pid:
        return pid
    try:
        while True:
            volume = Volume.open(str(folder))
            stage(volume, bundle)
            volume.drop(ONE)
            volume.sweep()
    finally:
        os._exit(1)


def test_killed_at_any_moment_it_is_staged_by_the_next(shared: Bundle, tmp_path: Path) -> None:
    """Whatever stands when two publishers die is whole, and the next one goes on from there."""
    volume, folder = open_volume(tmp_path)
    clean = tmp_path / "clean"
    clean.mkdir()
    ids = stage(Volume.open(str(clean)), shared)
    wanted = {name: data for name, data in content(clean).items() if name != ".lock"}
    dice = random.Random(11)
    for _ in range(20):
        pids = [publisher(shared, folder) for _ in range(2)]  # one of them waits for the other
        time.sleep(dice.uniform(0.0, 0.15))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # and did not end by an error of its own
        for bundle_id in volume.staged():  # what is staged is whole, before anybody mends anything
            for path in volume.placements(bundle_id).values():
                assert content(folder / path) == content(clean / path)
        assert stage(volume, shared) == ids
        volume.sweep()
        assert {name: data for name, data in content(folder).items() if name != ".lock"} == wanted
        assert not list((folder / ".staging").iterdir())


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Files of at most `size` bytes: stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_volume_is_named_and_nothing_is_staged(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    for size in (100, 1000, 4000):
        with limited(size), pytest.raises(TargetError, match=rf"volume {folder}: bundle 1+ was not staged: "):
            stage(volume, shared)
        assert volume.staged() == ()
    stage(volume, shared)


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "mount it writable"), (errno.EACCES, "let this user write")],
)
def test_what_the_system_refuses_comes_with_a_cure(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    volume, folder = open_volume(tmp_path)

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for place in ("os.fsync", "os.link"):
        with monkeypatch.context() as patch:
            patch.setattr(place, refused)
            with pytest.raises(TargetError, match=rf"volume {folder}: .*{os.strerror(number)}; {cure}"):
                stage(volume, shared)
        assert volume.staged() == ()
    stage(volume, shared)


def test_a_volume_that_cannot_be_written_is_named(shared: Bundle) -> None:
    with pytest.raises(TargetError, match="volume /sys: bundle 1+ was not staged: "):
        stage(Volume.open("/sys"), shared)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV])
def test_without_hard_links_every_folder_has_a_copy(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    volume, folder = open_volume(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.link", refused)
        ids = stage(volume, shared)
    assert stage(volume, shared) == ids
    for user, path in ids.items():
        assert (folder / path / "shared.safetensors").stat().st_nlink == 1
        assert_same_change(folder / path, shared, user)


def test_where_a_file_has_too_many_names_another_copy_is_made(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def full(source: Path, place: Path) -> None:
        if os.stat(source).st_nlink >= 2:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, place)

    monkeypatch.setattr("os.link", full)
    volume, folder = open_volume(tmp_path)
    ids = stage(volume, shared)
    assert all((folder / path / "shared.safetensors").is_file() for path in ids.values())
    assert stage(volume, shared) == ids


@pytest.mark.parametrize("where", ["/nowhere/at/all", "nothing://bucket/prefix"])
def test_a_volume_that_is_not_there_is_named(where: str) -> None:
    with pytest.raises(TargetError, match=rf"volume {where}"):
        Volume.open(where)
