"""A volume in a bucket: ids name its prefix, what was begun is finished, and what nobody names is swept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.targets.lorax_volume import Volume
from tests.soppu.targets.volumes import ONE, TWO, assert_same_change, other, shared, stage

__all__ = ["other", "shared"]


class TestBucket:
    @pytest.fixture
    def where(self, tmp_path: Path) -> Iterator[str]:
        yield f"memory://{tmp_path.name}/prefix"
        if fsspec.filesystem("memory").exists(f"/{tmp_path.name}"):
            fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)

    def test_ids_name_bucket_and_prefix_and_nothing_is_split(
        self, shared: Bundle, tmp_path: Path, where: str
    ) -> None:
        volume = Volume.open(where)
        assert volume.source == "s3"
        ids = stage(volume, shared)
        assert volume.placements(ONE) == ids == stage(volume, shared) and volume.staged() == (ONE,)
        for user, path in ids.items():
            assert path.startswith(f"{tmp_path.name}/prefix/adapters/{user}/") and len(path[-16:]) == 16
            local = tmp_path / user
            fsspec.filesystem("memory").get(f"/{path}", str(local), recursive=True)
            names = sorted(file.name for file in local.iterdir())
            assert names == ["adapter_config.json", "adapter_model.safetensors"]
            assert_same_change(local, shared, user)

    def test_what_was_begun_is_finished_and_what_nobody_names_is_swept(
        self, shared: Bundle, other: Bundle, where: str
    ) -> None:
        volume, system = Volume.open(where), fsspec.filesystem("memory")
        ids = stage(volume, shared)
        system.rm_file(f"/{ids['user1']}/adapter_config.json")  # killed before its last object
        assert stage(volume, shared) == ids and system.exists(f"/{ids['user1']}/adapter_config.json")
        lost = stage(volume, other, TWO)
        system.rm_file(f"/{where.removeprefix('memory://')}/bundles/{TWO}.json")
        assert set(volume.sweep()) == set(lost.values())
        volume.drop(ONE)
        assert system.find(f"/{where.removeprefix('memory://')}") == []

    def test_nothing_is_deleted_while_somebody_publishes(
        self, shared: Bundle, other: Bundle, where: str
    ) -> None:
        volume, system = Volume.open(where), fsspec.filesystem("memory")
        root = f"/{where.removeprefix('memory://')}"
        lost = stage(volume, other, TWO)
        system.rm_file(f"{root}/bundles/{TWO}.json")
        system.pipe_file(f"{root}/.staging/abc.json", json.dumps(time.time()).encode())
        assert volume.sweep() == ()
        system.pipe_file(f"{root}/.staging/abc.json", json.dumps(time.time() - 2 * 86_400).encode())
        assert set(volume.sweep()) == set(lost.values())
        assert system.find(f"{root}/.staging") == []

    def test_a_bucket_that_refuses_is_named(
        self, shared: Bundle, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: object, **__: object) -> None:
            raise RuntimeError("AccessDenied")

        volume = Volume.open(where)
        stage(volume, shared)
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", refused)
        with pytest.raises(TargetError, match=rf"volume {where}: bundle 2+ was not staged: AccessDenied"):
            stage(volume, shared, TWO)
