"""A forgotten user leaves no tensors behind, and is marked wherever they are still part of something."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from soppu.blobs import LocalBlobs
from soppu.errors import RegistryError, StorageError
from soppu.registry import Registry
from soppu.registry.catalogue import Catalogue
from tests.soppu.registries import MODEL, folder_of, freeze, local, make_adapter, registry, tree

__all__ = ["local", "registry"]


def test_a_forgotten_user_cannot_be_frozen_again_by_a_run_that_began_before(registry: Registry) -> None:
    chosen = {user: registry.put_adapter(make_adapter(n), user=user) for n, user in enumerate(("ann", "bob"))}
    registry.forget("bob")
    with pytest.raises(RegistryError, match="user 'bob'"):
        registry.freeze_current(MODEL, chosen=chosen, run="r1")
    assert registry.current_set() == {"ann": chosen["ann"]}


def test_forgetting_removes_what_only_this_user_held(registry: Registry) -> None:
    mine = registry.put_adapter(make_adapter(1), user="alice", metrics={"loss": 1.0})
    shared = registry.put_adapter(make_adapter(2), user="alice")
    registry.put_adapter(make_adapter(2), user="bob")
    bobs = registry.put_adapter(make_adapter(3), user="bob")
    first = freeze(registry, {"alice": mine, "bob": bobs})
    without = freeze(registry, {"bob": bobs})
    bundle_id, other = registry.put_bundle(b"1", set_id=first), registry.put_bundle(b"2", set_id=without)
    registry.record_publication(target="embedded", url="http://a", bundle_id=bundle_id)
    registry.record_publication(target="lorax", url="http://b", bundle_id=other)
    folder_of(registry, mine)

    report = registry.forget("alice")

    assert report.adapters_removed == (mine,)
    assert (report.sets_touched, report.bundles_touched) == ((first,), (bundle_id,))
    assert [one.place for one in report.publications_still_serving] == ["embedded http://a"]
    assert registry.current_set() == {"bob": bobs}
    assert registry.history("alice") == []
    assert registry.owner(shared) == ("bob",)
    assert registry.get_adapter(shared).content_hash() == make_adapter(2).content_hash()
    for call in (registry.get_adapter, registry.adapter_bytes):
        with pytest.raises(RegistryError, match=f"{mine} was forgotten"):
            call(mine)
    with pytest.raises(RegistryError, match="'alice' was forgotten"):
        registry.current("alice")
    assert registry.get_set(first) == {"alice": mine, "bob": bobs}
    assert registry.bundle(bundle_id).contains_forgotten
    assert not registry.bundle(other).contains_forgotten
    assert not registry._blobs.has(f"adapters/{mine}")
    with pytest.raises(RegistryError, match="'alice' does not hold"):
        freeze(registry, {"alice": mine, "bob": bobs})


def test_forgetting_leaves_no_copy_of_the_tensors_behind(tmp_path: Path) -> None:
    registry = Registry.open(
        f"memory://{tmp_path.name}", catalogue=f"sqlite:///{tmp_path}/c.db", cache=tmp_path / "cache"
    )
    mine = registry.put_adapter(make_adapter(1), user="alice", run="secret-run")
    weights = (folder_of(registry, mine) / "adapter_model.safetensors").read_bytes()[-64:]
    assert any(weights in data for data in tree(tmp_path / "cache").values())
    registry.forget("alice")
    assert tree(tmp_path / "cache") == {}
    assert fsspec.filesystem("memory").find(f"/{tmp_path.name}") == []
    assert all(b"secret-run" not in path.read_bytes() for path in tmp_path.glob("c.db*"))


def test_forgetting_takes_what_an_interrupted_write_left(local: Registry, tmp_path: Path) -> None:
    adapter_id = local.put_adapter(make_adapter(1), user="alice")
    left = tmp_path / "registry" / "adapters" / f".{adapter_id}.0123.tmp"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    local.forget("alice")
    assert list((tmp_path / "registry" / "adapters").iterdir()) == []


def test_a_bundle_stored_after_one_of_its_users_was_forgotten_is_marked(registry: Registry) -> None:
    mine = registry.put_adapter(make_adapter(1), user="alice")
    set_id = freeze(registry, {"alice": mine})
    registry.forget("alice")
    bundle_id = registry.put_bundle(b"1", set_id=set_id)
    assert registry.bundle(bundle_id).contains_forgotten


def test_a_forgotten_user_may_come_back(registry: Registry) -> None:
    mine = registry.put_adapter(make_adapter(1), user="alice", metrics={"loss": 1.0})
    set_id = freeze(registry, {"alice": mine})
    registry.forget("alice")
    assert registry.forget("alice").adapters_removed == ()
    assert registry.put_adapter(make_adapter(1), user="alice") == mine
    assert registry.get_adapter(mine).content_hash() == make_adapter(1).content_hash()
    (row,) = registry.history("alice")
    assert row.metrics == {}
    assert freeze(registry, {"alice": mine}) == set_id
    assert not registry.bundle(registry.put_bundle(b"1", set_id=set_id)).contains_forgotten


class RefusingBlobs(LocalBlobs):
    """A store whose first deletion fails."""

    refused = False

    def remove(self, key: str) -> None:
        if not self.refused:
            self.refused = True
            raise StorageError(f"{key}: not removed: read-only file system")
        super().remove(key)


def test_forgetting_again_finishes_what_failed(tmp_path: Path) -> None:
    registry = Registry(RefusingBlobs(tmp_path), Catalogue.open(f"sqlite:///{tmp_path}/c.db"))
    mine = registry.put_adapter(make_adapter(1), user="alice")
    with pytest.raises(StorageError, match="read-only"):
        registry.forget("alice")
    assert registry.current_set() == {}
    with pytest.raises(RegistryError, match="forgotten"):
        registry.get_adapter(mine)
    assert registry.forget("alice").adapters_removed == (mine,)
    assert not (tmp_path / "adapters" / mine).exists()
