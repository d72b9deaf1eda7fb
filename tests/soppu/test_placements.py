"""Placements: by which id a user is asked for where a server knows no users, and since when."""

from __future__ import annotations

import pytest

from soppu import published
from soppu.errors import RegistryError
from soppu.registry import Registry
from tests.soppu.registries import freeze, make_adapter, registry

__all__ = ["registry"]


def test_a_user_is_resolved_to_what_was_switched_to_last(registry: Registry) -> None:
    mine = registry.put_adapter(make_adapter(1), user="alice")
    set_id = freeze(registry, {"alice": mine, "bob": registry.put_adapter(make_adapter(3), user="bob")})
    one, two = (registry.put_bundle(data, set_id=set_id) for data in (b"1", b"2"))
    assert registry.resolve("alice") == [] and registry.live("http://l") == ""
    for bundle_id in (one, two):
        placed = {user: f"adapters/{user}/{bundle_id[:4]}" for user in ("alice", "bob")}
        registry.record_publication(target="lorax", url="http://l", bundle_id=bundle_id, placements=placed)
    registry.record_publication(target="embedded", url="http://e", bundle_id=one)
    by_name, by_path = registry.resolve("alice")
    assert (by_name.url, by_name.asked_as, by_name.bundle_id) == ("http://e", "alice", one)
    assert (by_path.url, by_path.asked_as, by_path.bundle_id) == (
        "http://l",
        f"adapters/alice/{two[:4]}",
        two,
    )
    assert by_path.adapter_id == mine and registry.live("http://l/") == two
    assert registry.placements("http://l") == placed and registry.placements("http://e") == {}


def test_the_same_bundle_by_other_ids_is_another_publication(registry: Registry) -> None:
    set_id = freeze(registry, {"alice": registry.put_adapter(make_adapter(1), user="alice")})
    bundle_id = registry.put_bundle(b"1", set_id=set_id)
    for asked_as in ("adapters/alice/1", "adapters/alice/1", "adapters/alice/2"):
        placed = {"alice": asked_as}
        registry.record_publication(target="lorax", url="http://l", bundle_id=bundle_id, placements=placed)
    assert len(registry.publications()) == 2
    assert registry.resolve("alice")[0].asked_as == "adapters/alice/2"


def test_a_forgotten_user_is_resolved_to_nothing_and_never_placed_again(registry: Registry) -> None:
    adapters = {
        user: registry.put_adapter(make_adapter(n), user=user) for n, user in enumerate(("alice", "bob"))
    }
    bundle_id = registry.put_bundle(b"1", set_id=freeze(registry, adapters))
    placed = {user: f"adapters/{user}/1" for user in adapters}
    registry.record_publication(target="lorax", url="http://l", bundle_id=bundle_id, placements=placed)
    registry.forget("alice")
    with pytest.raises(RegistryError, match="'alice' was forgotten"):
        registry.resolve("alice")
    assert registry.placements("http://l") == {"bob": "adapters/bob/1"}
    with pytest.raises(RegistryError, match="a user of it was forgotten"):
        registry.record_publication(target="lorax", url="http://m", bundle_id=bundle_id, placements=placed)
    assert len(registry.publications()) == 1
    with pytest.raises(RegistryError, match="unknown user 'carol'"):
        registry.resolve("carol")


def test_a_publication_is_noted_in_the_store_for_servers_that_follow(registry: Registry) -> None:
    set_id = freeze(registry, {"alice": registry.put_adapter(make_adapter(1), user="alice")})
    one, two = (registry.put_bundle(data, set_id=set_id) for data in (b"1", b"2"))
    blobs = registry._blobs
    assert published.newest(blobs) is None
    registry.record_publication(target="vllm", url="http://v/", bundle_id=one)
    first = published.newest(blobs)
    registry.record_publication(
        target="vllm", url="http://v/", bundle_id=one
    )  # no second row, and no second mark
    assert first is not None and published.newest(blobs) == first and first.bundle_id == one
    registry.record_publication(target="vllm", url="http://v", bundle_id=two)
    registry.record_publication(target="embedded", url="http://e", bundle_id=one)
    mine, all_ = published.newest(blobs, "http://v"), published.newest(blobs)
    assert mine is not None and all_ is not None and (mine.bundle_id, all_.url) == (two, "http://e")
    registry.record_publication(target="vllm", url="http://v", bundle_id=one)  # a rollback
    again = published.newest(blobs, "http://v/")
    assert again is not None and again.bundle_id == one and again.mark > first.mark
    assert published.bundle_path(blobs, one).read_bytes() == b"1"
