"""What a server keeps over kill -9, and how replicas follow a registry; real workers, no engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from soppu import adapter as adapters
from soppu import published
from soppu.blobs import open_blobs
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError, ConfigError, RegistryError, StorageError
from soppu.registry import Registry
from soppu.serve.layers import kernels
from soppu.serve.layers.kernels import Kernel
from soppu.serve.vllm_plugin.frontend.following import Follower, health
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker.static import Limits
from tests.share import share
from tests.soppu.registries import freeze, make_adapter
from tests.soppu.serve import handmade
from tests.soppu.serve.vllm_plugin import engine
from tests.soppu.serve.vllm_plugin.commanded import MIXED, SHARED, Server, _adapter, _same, begin

LAYER = "block.qkv_proj"
TWO: dict[str, handmade.Plan] = {"ann": [SHARED], "bob": [SHARED]}


def save(folder: Path, seed: int, users: dict[str, handmade.Plan] | None = None) -> tuple[Bundle, Path, str]:
    bundle = handmade.bundle(engine.SHAPES, users or TWO, seed=seed)
    path = folder / f"{seed}.soppu"
    return bundle, path, bundle.save(path)


def kill(server: Server) -> None:
    """What kill -9 leaves: nothing was written or removed, and the system has let go of the lock."""
    server.control.state._lock.close()


@pytest.mark.parametrize(
    "how", [kernels.plain, Limits(tokens=64, requests=8, bases=4)], ids=["plain", "static"]
)
def test_after_kill_minus_nine_everything_published_is_there(tmp_path: Path, how: Kernel | Limits) -> None:
    """The active one adapts fewer modules than the others: the restart has to prepare theirs too."""
    first, path, old = save(tmp_path, 1, MIXED)
    narrow = {name: shape for name, shape in engine.SHAPES.items() if name != "block.k_proj"}
    second, new_path = handmade.bundle(narrow, MIXED, seed=2), tmp_path / "2.soppu"
    new = second.save(new_path)
    third, third_path, staged = save(tmp_path, 3, MIXED)
    settings = Settings(path, tmp_path / "state", max_error=0.05, spare_rows=2)
    server = begin(settings, how)
    server.control.add_bundle(new_path, bundle_id=new)
    server.control.activate(new)
    adapters.write(_adapter(second, "ann"), tmp_path / "eve")
    server.control.add_adapter("eve", tmp_path / "eve")
    server.control.add_bundle(third_path, bundle_id=staged)
    (server.control.incoming / "half").write_bytes(b"an upload under way")
    for one in (new_path, third_path, tmp_path / "eve"):
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    kill(server)

    again = begin(settings, how)
    assert again.control.bank.active == new and list(again.control.bank.bundles()) == [old, new, staged]
    assert again.control.state.content.previous == old and not (again.control.incoming / "half").exists()
    wanted = {"ann": (second, "ann"), "eve": (second, "ann"), "cem": (second, "cem")}
    wanted |= {f"bob@{old}": (first, "bob"), f"cem@{staged}": (third, "cem")}
    for name, (bundle, user) in wanted.items():
        assert _same(again.change(name), engine.change(bundle, user, LAYER)), name
    assert health(again.control, None)[1]["staged"] == [old, staged]
    again.control.activate(old)
    again.control.drop_adapter("eve")
    kill(again)
    last = begin(settings, how)
    assert last.control.bank.active == old and last.control.state.content.previous == new
    assert last.control.bank.resolve("eve") is None and not list(
        (last.control.state.folder / "adapters").iterdir()
    )
    last.control.close()


def test_a_bundle_named_anew_is_served_and_what_was_is_the_one_before(tmp_path: Path) -> None:
    _, path, old = save(tmp_path, 1)
    _, published_path, published_id = save(tmp_path, 2)
    server = begin(Settings(path, tmp_path / "state"))
    server.control.add_bundle(published_path, bundle_id=published_id)
    server.control.activate(published_id)
    server.control.close()
    named, other, new = save(tmp_path, 3)
    server = begin(Settings(other, tmp_path / "state"))
    assert server.control.bank.active == new and server.control.state.content.previous == published_id
    assert _same(server.change("ann"), engine.change(named, "ann", LAYER))
    assert set(server.control.bank.bundles()) == {old, published_id, new}
    server.control.close()


def test_a_start_that_is_refused_leaves_what_was_kept(tmp_path: Path) -> None:
    _, path, old = save(tmp_path, 1)
    settings = Settings(path, tmp_path / "state")
    begin(settings).control.close()
    unfit = handmade.bundle({"block.gate_proj": (8, 20)}, TWO)
    unfit_path = tmp_path / "unfit.soppu"
    unfit.save(unfit_path)
    with pytest.raises(BundleError, match="no such linear layer"):
        begin(replace(settings, bundle=unfit_path))
    foreign = replace(unfit, base_hash="c" * 64)
    foreign.save(unfit_path)
    with pytest.raises(BundleError, match="made for base model cccccccccccc"):
        begin(replace(settings, bundle=unfit_path))
    server = begin(settings)
    assert list(server.control.bank.bundles()) == [old]
    kept = {path.name.split(".")[0] for path in server.control.state.folder.glob("bundles/*")}
    assert kept == {old}
    server.control.close()


def test_servers_share_a_folder_and_each_finds_its_own_again(tmp_path: Path) -> None:
    _, path, old = save(tmp_path, 1)
    _, other, new = save(tmp_path, 2)
    settings = Settings(path, tmp_path / "state")
    servers = [begin(settings), begin(settings)]
    assert [server.control.state.folder.name for server in servers] == ["0", "1"]
    servers[1].control.add_bundle(other, bundle_id=new)
    servers[1].control.activate(new)
    kill(servers[1])
    again = begin(settings)
    assert again.control.state.folder.name == "1" and again.control.bank.active == new
    assert servers[0].control.bank.active == old
    for server in (servers[0], again):
        server.control.close()


def test_what_is_damaged_or_cannot_be_written_is_named(tmp_path: Path) -> None:
    _, path, old = save(tmp_path, 1)
    _, other, new = save(tmp_path, 2)
    settings = Settings(path, tmp_path / "state")
    server = begin(settings)
    folder = server.control.state.folder
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()
    for change in (
        lambda: server.control.add_bundle(other, bundle_id=new),
        lambda: server.control.activate(""),
    ):
        with pytest.raises(StorageError, match="nothing was changed"):
            change()
    assert list(server.control.bank.bundles()) == [old] and len(server.worker.step.residents) == 1
    assert server.control.bank.active == old and server.change("ann").any()
    (folder / "state.json").rmdir()
    server.control.add_bundle(other, bundle_id=new)
    server.control.activate(new)
    kill(server)
    kept = folder / "bundles" / f"{new}.safetensors"
    kept.unlink()
    kept.write_bytes(b"no bundle")
    with pytest.raises(BundleError, match=f"{new}.safetensors: SHA-256 is"):
        begin(settings)
    (folder / "state.json").write_text('{"format": 2}')
    with pytest.raises(ConfigError, match=r"state\.json: not a server state of format 1; move it away"):
        begin(settings)


class Fleet:
    """A registry that publishes, and replicas that know its store alone."""

    def __init__(self, folder: Path, root: str | Path) -> None:
        self.root, self._folder = str(root), folder
        self.registry = Registry.open(
            root, catalogue=f"sqlite:///{folder}/catalogue.db", cache=folder / "cache"
        )
        adapter = self.registry.put_adapter(make_adapter(1), user="ann")
        self._set = freeze(self.registry, {"ann": adapter})

    def publish(self, bundle: Bundle, url: str = "http://canary:8000") -> str:
        path = self._folder / "made.soppu"
        bundle.save(path)
        bundle_id = self.registry.put_bundle(path.read_bytes(), set_id=self._set)
        self.registry.record_publication(target="vllm", url=url, bundle_id=bundle_id)
        return bundle_id

    def settings(self, name: str, follow_url: str = "") -> Settings:
        seconds = 0.1
        return Settings(
            self.root, self._folder / name, follow=self.root, follow_url=follow_url, follow_seconds=seconds
        )


@pytest.fixture(params=["local", "share"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root: str | Path = tmp_path / "registry" if request.param == "local" else share(tmp_path / "registry")
    yield Fleet(tmp_path, root)


def made(seed: int, users: dict[str, handmade.Plan] | None = None) -> Bundle:
    return handmade.bundle(engine.SHAPES, users or TWO, seed=seed)


def test_replicas_start_from_a_registry_and_converge_on_what_it_publishes(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="nothing was published in registry"):
        begin(fleet.settings("early"))
    first = fleet.publish(made(1))
    replicas = [begin(fleet.settings(name)) for name in ("one", "two")]
    followers = [Follower(one.control, one.control.settings) for one in replicas]

    def look() -> set[str]:
        for follower in followers:
            follower.look()
        return {one.control.bank.active for one in replicas}

    assert look() == {first} and health(replicas[0].control, followers[0])[0]
    published_ids = [first]
    for seed in (2, 3):
        bundle = made(seed)
        published_ids.append(fleet.publish(bundle))
        assert look() == {published_ids[-1]}
        assert all(_same(one.change("ann"), engine.change(bundle, "ann", LAYER)) for one in replicas)
    assert all(
        list(one.control.bank.bundles()) == published_ids[1:] for one in replicas
    )  # and the one before
    replicas[0].control.activate(published_ids[1])  # by hand: stays, until something is published
    assert look() == set(published_ids[1:])
    late = begin(fleet.settings("late"))
    assert late.control.bank.active == published_ids[2]
    fleet.registry.record_publication(target="vllm", url="http://canary:8000", bundle_id=first)
    assert look() == {first}
    for one in (*replicas, late):
        one.control.close()


def test_a_replica_that_cannot_follow_says_so_and_serves_on(fleet: Fleet) -> None:
    narrow = handmade.bundle({"block.q_proj": engine.SHAPES["block.q_proj"]}, TWO)
    first = fleet.publish(narrow)
    server = begin(fleet.settings("one"))
    follower = Follower(server.control, server.control.settings)
    follower.look()
    wide = fleet.publish(made(1))
    for _ in range(3):  # again and again, at its own pace
        follower.look()
    well, told = health(server.control, follower)
    assert not well and told["status"] == "behind" and told["active"] == first
    assert "is not among the 1 modules this server was started with; restart it" in follower.report.error
    assert follower.report.published == wide and server.change("ann", LAYER).any()
    assert len(server.worker.step.residents) == 1
    kill(server)
    again = begin(server.control.settings)  # a restart is the cure that is named
    assert again.control.bank.active == wide
    store = open_blobs(fleet.root)
    store.write("published/zz.json", "{}")
    follower = Follower(again.control, again.control.settings)
    follower.look()
    assert "a note is not of format 1" in follower.report.error and not health(again.control, follower)[0]
    kill(again)
    last = begin(again.control.settings)  # and a registry that cannot be read stops no restart
    assert last.control.bank.active == wide
    last.control.close()
    with pytest.raises(RegistryError, match="not of format 1"):
        begin(fleet.settings("new"))


def test_only_publications_to_the_url_asked_for_count(fleet: Fleet) -> None:
    mine, other = fleet.publish(made(1), "http://mine"), fleet.publish(made(2), "http://other")
    server = begin(fleet.settings("one", follow_url="http://mine/"))
    assert server.control.bank.active == mine
    anybody = published.newest(open_blobs(fleet.root))
    assert anybody is not None and anybody.bundle_id == other
    assert published.newest(open_blobs(fleet.root), "http://nobody") is None
    server.control.close()
