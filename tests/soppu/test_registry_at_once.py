"""Processes and threads that write at once lose and mix nothing, and a refused write changes nothing."""

from __future__ import annotations

import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from soppu.blobs import LocalBlobs
from soppu.errors import RegistryError, StorageError
from soppu.registry import Registry
from soppu.registry.catalogue import Catalogue
from tests.soppu.registries import (
    MODEL,
    SERVER,
    empty_server,
    freeze,
    local,
    make_adapter,
    published,
    registry,
    tree,
)

__all__ = ["local", "registry"]


def processes(count: int) -> ProcessPoolExecutor:
    """Real processes that share nothing; the server they come from imports torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soppu.registry.registry", "transformers"])
    return ProcessPoolExecutor(count, mp_context=context)


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
