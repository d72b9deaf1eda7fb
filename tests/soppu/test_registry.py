"""The registry's promises: idempotent, immutable, verified, safe among processes, and able to forget."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
import sqlalchemy as sa
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.blobs import LocalBlobs
from soppu.errors import AdapterError, RegistryError, StorageError
from soppu.registry import Registry
from soppu.registry.catalogue import Base as Tables
from soppu.registry.catalogue import Catalogue, Holding, Publication, User, now
from tests.share import share

BASE = "b" * 64
MODEL = Base("tiny", BASE)


def make_adapter(seed: int, *, features: int = 8, rank: int = 2) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj": LoraPair(
            torch.randn(rank, features, generator=generator), torch.randn(features, rank, generator=generator)
        )
        for layer in range(2)
    }
    return LoraAdapter(pairs, base_model="tiny", base_hash=BASE)


def freeze(registry: Registry, adapter_ids: Mapping[str, str]) -> str:
    """A set of these alone: nobody's adapter is of the base it is for."""
    return registry.freeze_current(Base("nobody's", "0" * 64), chosen=adapter_ids)


def folder_of(registry: Registry, adapter_id: str) -> Path:
    """Where the adapter's PEFT folder lies on this machine."""
    registry.get_adapter(adapter_id)  # makes the local copy of a remote one
    return registry._blobs.here / "adapters" / adapter_id


def published(registry: Registry, target: str, url: str = "") -> Publication | None:
    """What a target serves; the newest of any URL if none is given."""
    return next((p for p in registry.publications() if p.target == target and url in ("", p.url)), None)


SERVER = os.environ.get("SOPPU_TEST_CATALOGUE", "")  # a database to run these tests on as well; emptied!


def empty_server() -> None:
    engine = sa.create_engine(SERVER)
    Tables.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture(params=["local", "share", *(["server"] if SERVER else [])])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    if request.param == "local":
        yield Registry.open(tmp_path / "registry")
        return
    if request.param == "server":
        empty_server()
        server = Registry.open(tmp_path / "registry", catalogue=SERVER)
        yield server
        server.close()
        return
    root = share(tmp_path / "share")
    yield Registry.open(root, catalogue=f"sqlite:///{tmp_path}/c.db", cache=tmp_path / "cache")


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry")


def processes(count: int) -> ProcessPoolExecutor:
    """Real processes that share nothing; the server they come from imports torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soppu.registry.registry", "transformers"])
    return ProcessPoolExecutor(count, mp_context=context)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below root but the catalogue's."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("catalogue.db")
    }


def test_put_is_idempotent_and_the_id_is_the_content(registry: Registry) -> None:
    adapter = make_adapter(1)
    first = registry.put_adapter(adapter, user="alice", run="r1", metrics={"loss": 2.5})
    again = registry.put_adapter(make_adapter(1), user="alice", run="r1", metrics={"gain": 0.5})
    assert first == again == f"a-{adapter.content_hash()[:16]}"
    (row,) = registry.history("alice")
    assert (row.adapter_id, row.run, row.current) == (first, "r1", True)
    assert row.metrics == {"loss": 2.5, "gain": 0.5}
    stored = registry.get_adapter(first)
    assert stored.content_hash() == adapter.content_hash()
    assert (stored.base_model, stored.base_hash) == ("tiny", BASE)


def test_history_keeps_the_order_and_an_old_adapter_can_become_current_again(registry: Registry) -> None:
    old = registry.put_adapter(make_adapter(1), user="alice", run="r1")
    new = registry.put_adapter(make_adapter(2), user="alice", run="r2")
    assert registry.current("alice") == new
    registry.put_adapter(make_adapter(1), user="alice", run="r3")
    assert registry.current("alice") == old
    assert [(row.adapter_id, row.run) for row in registry.history("alice")] == [
        (old, "r1"),
        (new, "r2"),
        (old, "r3"),
    ]
    assert [row.current for row in registry.history("alice")] == [False, False, True]
    (user,) = registry.users()
    assert (user.user, user.adapter_id, user.versions) == ("alice", old, 3)


def test_tensors_changed_after_they_were_hashed_get_the_id_of_what_they_are_now(registry: Registry) -> None:
    adapter = make_adapter(1)
    before = adapter.content_hash()
    adapter.pairs["model.layers.0.self_attn.q_proj"].A.add_(1.0)
    adapter_id = registry.put_adapter(adapter, user="alice")
    assert adapter_id != f"a-{before[:16]}"
    stored = registry.get_adapter(adapter_id).pairs["model.layers.0.self_attn.q_proj"].A
    assert torch.equal(stored, adapter.pairs["model.layers.0.self_attn.q_proj"].A)


def test_what_must_not_be_stored_leaves_no_trace(local: Registry, tmp_path: Path) -> None:
    broken = make_adapter(1)
    broken.pairs["model.layers.1.self_attn.q_proj"].B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="'alice'.*layers.1"):
        local.put_adapter(broken, user="alice")
    with pytest.raises(RegistryError, match="'alice'.*'loss' is nan"):
        local.put_adapter(make_adapter(1), user="alice", metrics={"loss": float("nan")})
    with pytest.raises(RegistryError, match="'al/ice'.*A-Z"):
        local.put_adapter(make_adapter(1), user="al/ice")
    assert local.users() == []
    assert tree(tmp_path / "registry") == {}


def test_two_users_may_hold_one_adapter(registry: Registry) -> None:
    shared = registry.put_adapter(make_adapter(1), user="bob")
    assert registry.put_adapter(make_adapter(1), user="alice") == shared
    registry.put_adapter(make_adapter(2), user="alice")
    assert registry.owner(shared) == ("alice", "bob")
    assert registry.current_set() == {"alice": registry.current("alice"), "bob": shared}


def test_unknown_ids_are_named(registry: Registry) -> None:
    registry.put_adapter(make_adapter(1), user="alice")
    calls = [registry.get_adapter, registry.adapter_bytes, registry.owner]
    calls += [registry.get_set, registry.bundle, registry.bundle_path, registry.bundle_bytes]
    calls += [registry.current, registry.history, registry.forget]
    for call in calls:
        with pytest.raises(RegistryError, match="unknown .*'../a-0'"):
            call("../a-0")


def test_the_folder_loads_in_peft_and_gives_the_merged_logits(registry: Registry) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    names = ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    pairs = {
        name: LoraPair(torch.randn(rank, shapes[name][1]) / 4, torch.randn(shapes[name][0], rank) / 4)
        for name, rank in zip(names, (2, 3), strict=True)
    }
    adapter_id = registry.put_adapter(LoraAdapter(pairs, base_hash=BASE), user="alice")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain = model(tokens).logits
        for name, pair in pairs.items():
            model.get_submodule(name).weight += pair.delta()
        expected = model(tokens).logits
        for name, pair in pairs.items():
            model.get_submodule(name).weight -= pair.delta()
        loaded = PeftModel.from_pretrained(model, str(folder_of(registry, adapter_id))).eval()
        found = loaded(tokens).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert registry.adapter_bytes(adapter_id) > sum(p.A.nbytes + p.B.nbytes for p in pairs.values())


def _flip_a_weight(folder: Path) -> None:
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "adapter_model.safetensors").write_bytes(bytes(data))


def _truncate(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "adapter_model.safetensors").write_bytes(data[:-10])


def _scale_it(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").chmod(0o644)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))


def _lose_a_file(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize("damage", [_flip_a_weight, _truncate, _scale_it, _lose_a_file])
def test_a_damaged_adapter_is_refused_by_its_id_and_never_overwritten(
    local: Registry, tmp_path: Path, damage: object
) -> None:
    adapter_id = local.put_adapter(make_adapter(1), user="alice")
    damage(tmp_path / "registry" / "adapters" / adapter_id)  # type: ignore[operator]
    before = tree(tmp_path / "registry")
    with pytest.raises(RegistryError, match=adapter_id):
        local.get_adapter(adapter_id)
    with pytest.raises(RegistryError, match=adapter_id):
        local.put_adapter(make_adapter(1), user="bob")
    assert tree(tmp_path / "registry") == before
    assert local.owner(adapter_id) == ("alice",)


def test_an_adapter_swapped_for_another_valid_one_is_refused(local: Registry, tmp_path: Path) -> None:
    mine = local.put_adapter(make_adapter(1), user="alice")
    other = local.put_adapter(make_adapter(2), user="bob")
    folder = tmp_path / "registry" / "adapters"
    (folder / mine).rename(folder / "kept")
    (folder / other).rename(folder / mine)
    with pytest.raises(RegistryError, match=f"{mine}.*content {other[2:]}"):
        local.get_adapter(mine)


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


def test_runs_that_freeze_at_once_never_mix(local: Registry, tmp_path: Path) -> None:
    users = [f"u{n:02d}" for n in range(12)]
    runs = [
        {
            user: local.put_adapter(make_adapter(100 * r + n), user=user, run=f"r{r}")
            for n, user in enumerate(users)
        }
        for r in range(4)
    ]

    def freeze(number: int) -> set[tuple[str, ...]]:
        with closing(Registry.open(tmp_path / "registry")) as own:
            chosen = runs[number % 4]
            made = own.get_set(own.freeze_current(MODEL, chosen=chosen, run=f"r{number % 4}"))
            nightly = own.get_set(own.freeze_current(MODEL))
        assert made == chosen
        return {tuple(nightly[user] for user in users)}

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(freeze, range(24)))
    assert seen <= {tuple(run[user] for user in users) for run in runs}


def test_who_is_chosen_is_in_the_set_though_their_adapter_names_its_base_otherwise(
    registry: Registry,
) -> None:
    unstamped = LoraAdapter(make_adapter(1).pairs, base_model="tiny")
    chosen = {"ann": registry.put_adapter(unstamped, user="ann")}
    bob = registry.put_adapter(make_adapter(2), user="bob")
    assert registry.get_set(registry.freeze_current(MODEL, chosen=chosen)) == {**chosen, "bob": bob}


def _publish_and_record(root: str, url: str, bundle_ids: list[str]) -> None:
    """Switch a "server" (a file) to each bundle in turn and record it, as publish and rollback do."""
    registry = Registry.open(root)
    for bundle_id in bundle_ids:
        with registry.publishing(url):
            Path(root, "live").write_text(bundle_id)
            registry.record_publication(target="embedded", url="http://here", bundle_id=bundle_id)
            assert Path(root, "live").read_text() == bundle_id


def test_processes_that_switch_one_url_leave_on_record_what_is_live(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry.open(root)
    set_id = freeze(registry, {"ann": registry.put_adapter(make_adapter(1), user="ann")})
    bundles = [registry.put_bundle(str(n).encode(), set_id=set_id) for n in range(8)]
    urls = ["http://here", "http://here/"]  # one server, written twice
    with processes(2) as pool:
        list(pool.map(_publish_and_record, [str(root)] * 2, urls, [bundles * 5, bundles[::-1] * 5]))
    live = published(registry, "embedded", "http://here")
    assert live is not None and live.bundle_id == (root / "live").read_text()


def _compress_the_same(root: str, set_id: str) -> str:
    return Registry.open(root).put_bundle(b"the same bytes" * 1000, set_id=set_id)


@pytest.mark.long
def test_two_compressions_that_end_in_one_bundle_store_it_once(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry.open(root)
    set_id = freeze(registry, {"ann": registry.put_adapter(make_adapter(1), user="ann")})
    with processes(3) as pool:
        made = set(pool.map(_compress_the_same, [str(root)] * 6, [set_id] * 6))
    assert len(made) == 1 == len(os.listdir(root / "bundles"))
    assert registry.bundle_path(made.pop()).read_bytes() == b"the same bytes" * 1000


def test_a_forgotten_user_cannot_be_frozen_again_by_a_run_that_began_before(registry: Registry) -> None:
    chosen = {user: registry.put_adapter(make_adapter(n), user=user) for n, user in enumerate(("ann", "bob"))}
    registry.forget("bob")
    with pytest.raises(RegistryError, match="user 'bob'"):
        registry.freeze_current(MODEL, chosen=chosen, run="r1")
    assert registry.current_set() == {"ann": chosen["ann"]}


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


class ForgetfulBlobs(LocalBlobs):
    """A store in which the first blob is removed by somebody right after it was put."""

    removed = False

    def put(self, key: str, fill: object, check: object) -> None:
        super().put(key, fill, check)  # type: ignore[arg-type]
        if not self.removed:
            self.removed = True
            self.remove(key)


def test_an_adapter_removed_while_it_is_put_is_put_again(tmp_path: Path) -> None:
    registry = Registry(ForgetfulBlobs(tmp_path), Catalogue.open(f"sqlite:///{tmp_path}/c.db"))
    mine = registry.put_adapter(make_adapter(1), user="alice")
    assert registry.get_adapter(mine).content_hash() == make_adapter(1).content_hash()
    assert len(registry.history("alice")) == 1


def _put_ten(root: str, catalogue: str, worker: int) -> list[tuple[str, str]]:
    """Ten puts of one process: five users of its own, five adapters that every process puts."""
    torch.set_num_threads(1)
    registry = Registry.open(root, catalogue=catalogue)
    put = []
    for number in range(5):
        user = f"user-{worker}-{number}"
        put.append((user, registry.put_adapter(make_adapter(100 * worker + number), user=user)))
        put.append(("shared", registry.put_adapter(make_adapter(9000 + number), user="shared")))
    return put


@pytest.mark.parametrize("catalogue", ["", *([SERVER] if SERVER else [])])
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, catalogue: str) -> None:
    if catalogue:
        empty_server()
    root = str(tmp_path / "registry")  # created by all four at once
    with processes(4) as pool:
        put = [pair for pairs in pool.map(_put_ten, [root] * 4, [catalogue] * 4, range(4)) for pair in pairs]
    assert len(put) == 40
    registry = Registry.open(root, catalogue=catalogue)
    current = registry.current_set()
    assert len(current) == 21
    for user, adapter_id in put:
        assert user in registry.owner(adapter_id)
        assert f"a-{registry.get_adapter(adapter_id).content_hash()[:16]}" == adapter_id
        if user != "shared":
            assert current[user] == adapter_id
            assert len(registry.history(user)) == 1
    assert {row.adapter_id for row in registry.history("shared")} == {a for u, a in put if u == "shared"}
    assert len(os.listdir(tmp_path / "registry" / "adapters")) == 25  # and no temporary folder


def test_threads_that_write_and_forget_at_once_lose_nothing(registry: Registry) -> None:
    def work(number: int) -> str:
        registry.put_adapter(make_adapter(number % 3), user=f"user-{number}")
        registry.put_adapter(make_adapter(50), user="passing")
        registry.forget("passing")
        return registry.put_adapter(make_adapter(100 + number % 5), user=f"user-{number}")

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(work, range(16)))
    assert registry.current_set() == {f"user-{number}": adapter_id for number, adapter_id in enumerate(made)}
    for adapter_id in set(made):
        registry.get_adapter(adapter_id)
    registry.forget("passing")
    with pytest.raises(RegistryError, match="forgotten"):
        registry.get_adapter(f"a-{make_adapter(50).content_hash()[:16]}")


def _put_under_a_limit(root: str, features: int, limit: int) -> str:
    """Put where no file may grow above `limit` bytes: the kernel refuses, as a full disk does."""
    registry = Registry.open(root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        registry.put_adapter(make_adapter(2, features=features), user="alice")
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("features", "limit"), [(4096, 40_000), (8, 4000)], ids=["blob", "catalogue"])
def test_a_refused_write_leaves_everything_as_it_was(tmp_path: Path, features: int, limit: int) -> None:
    root = tmp_path / "registry"
    registry = Registry.open(root)
    old = registry.put_adapter(make_adapter(1), user="alice")
    before, users = tree(root), registry.users()
    with processes(1) as pool:
        message = pool.submit(_put_under_a_limit, str(root), features, limit).result()
    assert message
    assert registry.users() == users
    assert registry.get_adapter(old).content_hash() == make_adapter(1).content_hash()
    assert {name: data for name, data in tree(root).items() if name in before} == before
    assert not [name for name in tree(root) if ".tmp" in name]
    new = registry.put_adapter(make_adapter(2, features=features), user="alice")
    assert registry.current("alice") == new


def test_a_registry_that_is_not_there_is_not_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(tmp_path / "typo", create=False)
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(tmp_path / "typo", catalogue=f"sqlite:///{tmp_path}/typo.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_root_may_be_relative_and_hold_any_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter_id = Registry.open("a b?c%20#d").put_adapter(make_adapter(1), user="alice")
    monkeypatch.chdir("/")
    again = Registry.open(tmp_path / "a b?c%20#d", create=False)
    assert again.current("alice") == adapter_id
    assert folder_of(again, adapter_id).is_relative_to(tmp_path / "a b?c%20#d")


def test_roots_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"memory://x.*needs a catalogue"):
        Registry.open("memory://x")
    with pytest.raises(RegistryError, match=r"nosuch://x"):
        Registry.open("nosuch://x", catalogue=f"sqlite:///{tmp_path}/c.db")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be created"):
        Registry.open(tmp_path / "file" / "registry")


def test_stored_files_are_read_only_and_readable_by_others(local: Registry) -> None:
    folder = folder_of(local, local.put_adapter(make_adapter(1), user="alice"))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}


def test_the_identity_changes_when_something_was_deleted_or_the_registry_made_anew(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    before = registry.identity()
    registry.put_adapter(make_adapter(1), user="alice")
    assert Registry.open(tmp_path / "registry").identity() == before
    registry.forget("alice")
    assert registry.identity() != before
    assert Registry.open(tmp_path / "other").identity() != before
