"""Frozen sets, bundles and publications are named by what they hold, and refused where it does not fit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import sqlalchemy as sa

from soppu.adapter import LoraAdapter
from soppu.errors import RegistryError
from soppu.registry import Registry
from soppu.registry.catalogue import Holding, User, now
from tests.soppu.registries import MODEL, freeze, local, make_adapter, published, registry

__all__ = ["local", "registry"]


def test_frozen_sets_are_named_by_their_pairs(registry: Registry) -> None:
    alice = registry.put_adapter(make_adapter(1), user="alice")
    bob = registry.put_adapter(make_adapter(2), user="bob")
    set_id = freeze(registry, {"bob": bob, "alice": alice})
    assert freeze(registry, {"alice": alice, "bob": bob}) == set_id
    assert freeze(registry, {"alice": alice}) != set_id
    registry.put_adapter(make_adapter(3), user="alice")
    assert registry.get_set(set_id) == {"alice": alice, "bob": bob}
    assert list(registry.get_set(set_id)) == ["alice", "bob"]
    assert freeze(registry, {"alice": alice, "bob": bob}) == set_id  # an old version is still held


def test_a_set_must_hold_what_its_users_hold(registry: Registry) -> None:
    alice = registry.put_adapter(make_adapter(1), user="alice")
    registry.put_adapter(make_adapter(2), user="bob")
    with pytest.raises(RegistryError, match=f"'bob' does not hold adapter '{alice}'"):
        freeze(registry, {"alice": alice, "bob": alice})
    with pytest.raises(RegistryError, match="at least one user"):
        freeze(registry, {})


def test_a_set_of_more_users_than_one_statement_takes(local: Registry) -> None:
    adapter_id = local.put_adapter(make_adapter(1), user="u0")
    with local._catalogue.write() as session:  # 1,200 puts would take a minute: write the rows at once
        names = [f"u{number}" for number in range(1, 1201)]
        users = [{"id": name, "holding_id": 10 + i, "created_at": now()} for i, name in enumerate(names)]
        held = [
            {"id": 10 + i, "user_id": name, "adapter_id": adapter_id, "run": "", "metrics": {}, "at": now()}
            for i, name in enumerate(names)
        ]
        session.execute(sa.insert(User), users)
        session.execute(sa.insert(Holding), held)
    chosen = local.current_set()
    assert len(chosen) == 1201
    assert local.get_set(freeze(local, chosen)) == chosen
    with pytest.raises(RegistryError, match="'zoe' does not hold"):
        freeze(local, {**chosen, "zoe": adapter_id})


def test_a_run_freezes_its_own_adapters_whatever_another_put_meanwhile(registry: Registry) -> None:
    mine = {user: registry.put_adapter(make_adapter(n), user=user, run="r1") for n, user in enumerate("abc")}
    theirs = {
        user: registry.put_adapter(make_adapter(10 + n), user=user, run="r2") for n, user in enumerate("bcd")
    }
    set_id = registry.freeze_current(MODEL, chosen=mine, run="r1")
    assert registry.get_set(set_id) == {**mine, "d": theirs["d"]}
    assert registry.current_set() == {**mine, "d": theirs["d"]}
    other = registry.freeze_current(MODEL, chosen=theirs, run="r2")
    assert registry.get_set(other) == {"a": mine["a"], **theirs}
    assert registry.get_set(set_id) == {**mine, "d": theirs["d"]}
    assert registry.freeze_current(MODEL) == other  # what a nightly finds


def test_who_is_chosen_is_in_the_set_though_their_adapter_names_its_base_otherwise(
    registry: Registry,
) -> None:
    unstamped = LoraAdapter(make_adapter(1).pairs, base_model="tiny")
    chosen = {"ann": registry.put_adapter(unstamped, user="ann")}
    bob = registry.put_adapter(make_adapter(2), user="bob")
    assert registry.get_set(registry.freeze_current(MODEL, chosen=chosen)) == {**chosen, "bob": bob}


def test_bundles_are_named_by_their_bytes(registry: Registry) -> None:
    set_id = freeze(registry, {"alice": registry.put_adapter(make_adapter(1), user="alice")})
    bundle_id = registry.put_bundle(b"basis and cores", set_id=set_id, run="r1")
    assert bundle_id == hashlib.sha256(b"basis and cores").hexdigest()
    assert registry.put_bundle(b"basis and cores", set_id=set_id) == bundle_id
    assert registry.bundle_path(bundle_id).read_bytes() == b"basis and cores"
    assert registry.bundle_bytes(bundle_id) == 15
    row = registry.bundle(bundle_id)
    assert (row.set_id, row.run, row.contains_forgotten) == (set_id, "r1", False)


def test_bundles_that_do_not_fit_are_refused(registry: Registry) -> None:
    alice = registry.put_adapter(make_adapter(1), user="alice")
    bob = registry.put_adapter(make_adapter(2), user="bob")
    one = freeze(registry, {"alice": alice})
    two = freeze(registry, {"bob": bob})
    bundle_id = registry.put_bundle(b"1", set_id=one)
    with pytest.raises(RegistryError, match=f"{bundle_id[:12]} is stored for set {one}, not {two}"):
        registry.put_bundle(b"1", set_id=two)
    with pytest.raises(RegistryError, match="unknown set 's-0'"):
        registry.put_bundle(b"2", set_id="s-0")


def test_a_damaged_bundle_is_refused(local: Registry, tmp_path: Path) -> None:
    set_id = freeze(local, {"alice": local.put_adapter(make_adapter(1), user="alice")})
    bundle_id = local.put_bundle(b"basis and cores", set_id=set_id)
    path = local.bundle_path(bundle_id)
    path.chmod(0o644)
    path.write_bytes(b"basis and c0res")
    with pytest.raises(RegistryError, match=f"{bundle_id}.*damaged"):
        local.bundle_path(bundle_id)
    with pytest.raises(RegistryError, match=bundle_id):
        local.put_bundle(b"basis and cores", set_id=set_id)
    path.unlink()
    with pytest.raises(RegistryError, match=f"{bundle_id}.*not in the store"):
        local.bundle_path(bundle_id)


def test_publications_latest_rollback_and_retry(registry: Registry) -> None:
    set_id = freeze(registry, {"alice": registry.put_adapter(make_adapter(1), user="alice")})
    one, two = (registry.put_bundle(data, set_id=set_id) for data in (b"1", b"2"))
    assert published(registry, "embedded") is None
    for bundle_id in (one, two, two):
        registry.record_publication(target="embedded", url="http://a", bundle_id=bundle_id)
    registry.record_publication(target="lorax", url="http://a", bundle_id=one)
    assert published(registry, "embedded").bundle_id == two  # type: ignore[union-attr]
    registry.record_publication(target="embedded", url="http://a", bundle_id=one)
    assert published(registry, "embedded", "http://a").bundle_id == one  # type: ignore[union-attr]
    registry.record_publication(target="embedded", url="http://b", bundle_id=two)
    assert published(registry, "embedded", "http://a").bundle_id == one  # type: ignore[union-attr]
    assert published(registry, "embedded").url == "http://b"  # type: ignore[union-attr]
    assert published(registry, "embedded", "http://c") is None
    assert [(p.place, p.bundle_id) for p in registry.publications()] == [
        ("embedded http://b", two),
        ("embedded http://a", one),
        ("lorax http://a", one),
        ("embedded http://a", two),
        ("embedded http://a", one),
    ]
    with pytest.raises(RegistryError, match="unknown bundle 'x'"):
        registry.record_publication(target="embedded", url="", bundle_id="x")


def test_users_and_history_say_which_version_is_served(registry: Registry) -> None:
    old = registry.put_adapter(make_adapter(1), user="alice")
    set_id = freeze(registry, {"alice": old})
    bundle_id = registry.put_bundle(b"1", set_id=set_id)
    registry.record_publication(target="embedded", url="http://a", bundle_id=bundle_id)
    registry.put_adapter(make_adapter(2), user="alice")
    registry.put_adapter(make_adapter(3), user="bob")
    alice, bob = registry.users()
    assert (alice.published, bob.published) == ({"embedded http://a": old}, {})
    assert [row.published for row in registry.history("alice")] == [("embedded http://a",), ()]
