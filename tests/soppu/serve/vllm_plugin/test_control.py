"""Bundles that come and go while requests are under way; one real worker, no engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soppu import adapter as adapters
from soppu.cores import folder as core_folder
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError, BundleError, RequestError
from soppu.serve.bank.holdings import Answer
from soppu.serve.bank.newcomers import Asked, Newcomers
from soppu.serve.vllm_plugin.frontend.control import Control, Engine
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker.static import Limits
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine
from tests.soppu.serve.vllm_plugin.commanded import SHARED, Server, _adapter, _same, _second, _serve, _wait


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from _serve(tmp_path, handmade.bundle(engine.SHAPES, {"ann": [SHARED], "bob": [SHARED]}))


def test_a_staged_bundle_is_asked_for_by_version_and_switched_to(server: Server, tmp_path: Path) -> None:
    old = server.change("ann")
    bundle, path, bundle_id = _second(tmp_path)
    assert server.control.add_bundle(path, bundle_id=bundle_id)
    assert not server.control.add_bundle(path, bundle_id=bundle_id)
    new = engine.change(bundle, "ann", "block.qkv_proj")
    assert _same(server.change("ann"), old) and server.control.bank.resolve("cem") is None
    assert _same(server.change(f"ann@{bundle_id}"), new) and _same(server.change(f"ann@{bundle_id[:8]}"), new)
    before = server.control.activate(bundle_id)
    assert _same(server.change("ann"), new) and _same(server.change(f"ann@{before}"), old)
    assert server.control.bank.names() == ("ann", "cem") and server.control.bank.resolve("bob") is None
    assert server.control.bank.answers("ann") == Answer(
        "ann", bundle_id, (f"ann@{before}", f"ann@{bundle_id}")
    )
    assert server.control.bank.answers("bob") == Answer(loaded=(f"bob@{before}",))
    assert server.control.bank.answers("nobody") is None
    assert server.control.activate(before) == bundle_id
    assert _same(server.change("ann"), old)


def test_a_user_who_joins_by_a_core_is_served_as_it_says_and_nobody_else_otherwise(
    server: Server, tmp_path: Path
) -> None:
    before = {user: server.change(user) for user in ("ann", "bob")}
    first = server.control.bank.active
    newcomers = Newcomers(lambda: server.control)
    basis, draw = newcomers.bases()[1][0], torch.Generator().manual_seed(2)
    cores = {name: torch.randn(*shape, generator=draw) for name, shape in basis.core_shapes().items()}
    core = CoreAdapter(basis.id, cores, {}, basis.base_model, basis.base_hash, basis.fan_in_fan_out)
    core_folder.write(core, tmp_path / "core")
    record, new = newcomers.take(Asked("dora", tmp_path / "core"))
    assert new and record.before == first and server.control.bank.active == record.bundle_id
    pairs = CoreInBasis(core, basis).to_lora().pairs
    wanted = torch.cat([pairs[name].delta() for name in engine.PACKED["block.qkv_proj"]])
    assert _same(server.change("dora"), wanted.double())
    assert all(_same(server.change(user), change) for user, change in before.items())
    assert [one.user for one in newcomers.records().values()] == ["dora"]
    with pytest.raises(RequestError, match="somebody has changed it meanwhile"):
        server.control.activate(first, instead_of=first)


def test_a_request_finishes_on_the_version_that_is_dropped(server: Server, tmp_path: Path) -> None:
    _, path, bundle_id = _second(tmp_path)
    old, was = server.change("ann"), server.control.bank.resolve("ann")
    assert was is not None
    server.control.add_bundle(path, bundle_id=bundle_id)
    server.control.activate(bundle_id)
    server.busy.add(was.row)
    server.control.drop_bundle(was.version)
    assert not server.control.bank.is_current(was.row, was.version)
    assert server.control.bank.resolve(f"ann@{was.version}") is None
    time.sleep(1.2)
    assert _same(server.of_row(was.row), old)
    server.busy.clear()
    _wait(lambda: len(server.worker.step.residents) == 1)
    with pytest.raises(BundleError, match="belongs to none"):
        server.of_row(was.row)
    assert server.change("cem").any()


def test_a_bundle_that_is_staged_again_gets_rows_of_its_own(server: Server, tmp_path: Path) -> None:
    _, path, bundle_id = _second(tmp_path)
    server.control.add_bundle(path, bundle_id=bundle_id)
    first = server.control.bank.resolve(f"ann@{bundle_id}")
    assert first is not None
    server.busy.add(first.row)
    server.control.drop_bundle(bundle_id)
    server.control.add_bundle(path, bundle_id=bundle_id)
    again = server.control.bank.resolve(f"ann@{bundle_id}")
    assert again is not None and again.row != first.row
    server.busy.clear()
    _wait(lambda: len(server.worker.step.residents) == 2)
    assert _same(server.of_row(again.row), engine.change(_second(tmp_path)[0], "ann", "block.qkv_proj"))


def test_what_cannot_be_changed_says_why(server: Server, tmp_path: Path) -> None:
    first = server.control.bank.active
    with pytest.raises(BundleError, match="is active; activate another one first"):
        server.control.drop_bundle(first)
    with pytest.raises(BundleError, match="is not loaded; there are 1"):
        server.control.activate("0" * 64)
    other = handmade.bundle(engine.SHAPES, {"ann": [SHARED]}, sizes=handmade.Sizes(k_out=4, k_in=6))
    path = tmp_path / "third.soppu"
    other_id = other.save(path)
    with pytest.raises(BundleError, match="expected 00000000"):
        server.control.add_bundle(path, bundle_id="0" * 64)
    assert server.control.add_bundle(path, bundle_id=other_id)  # of other ranks, beside the first
    assert _same(server.change(f"ann@{other_id}"), engine.change(other, "ann", "block.qkv_proj"))


def test_a_bundle_for_more_modules_than_prepared_asks_for_a_restart(tmp_path: Path) -> None:
    narrow = handmade.bundle({"block.q_proj": engine.SHAPES["block.q_proj"]}, {"ann": [SHARED]})
    (server,) = _serve(tmp_path, narrow)
    _, path, bundle_id = _second(tmp_path)
    with pytest.raises(BundleError, match=r"block\.k_proj is not among the 1 modules.*restart it"):
        server.control.add_bundle(path, bundle_id=bundle_id)
    assert list(server.control.bank.bundles()) == [server.control.bank.active]


def test_a_bundle_of_another_base_model_or_with_the_base_models_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "first.soppu"
    handmade.bundle(engine.SHAPES, {"base": [SHARED]}).save(path)
    with pytest.raises(BundleError, match="made for base model bbbbbbbbbbbb "):
        Control(Settings(path, tmp_path / "state"), base_hash="c" * 64)
    with pytest.raises(BundleError, match="user 'base' has the name the base model is served under"):
        Control(Settings(path, tmp_path / "state"), base_hash=tiny.BASE_HASH, reserved=["base"])


def test_without_a_hash_the_names_decide_for_bundles_and_adapters(tmp_path: Path) -> None:
    path = tmp_path / "first.soppu"
    bundle = replace(handmade.bundle(engine.SHAPES, {"ann": [SHARED]}), base_hash="", base_model="org/Tiny")
    bundle.save(path)
    control = Control(
        Settings(path, tmp_path / "state"), base_hash=tiny.BASE_HASH, base_model="/models/tiny/"
    )
    for other in ("/models/other", ""):
        with pytest.raises(BundleError, match=r"made for base model unknown \(org/Tiny\), .*--base"):
            Control(Settings(path, tmp_path / "state"), base_hash=tiny.BASE_HASH, base_model=other)
    foreign = replace(_adapter(bundle, "ann"), base_hash="", base_model="org/other")
    adapters.write(foreign, tmp_path / "foreign")
    with pytest.raises(AdapterError, match=r"dee: made for base model unknown \(org/other\), .*--base"):
        control.add_adapter("dee", tmp_path / "foreign")
    control.close()


def test_a_recorded_pass_has_room_for_the_bases_of_later_bundles(tmp_path: Path) -> None:
    plans: dict[str, handmade.Plan] = {"ann": [("own", "own")], "bob": [("own",)]}
    none = handmade.bundle(engine.SHAPES, plans, sizes=handmade.Sizes(k_out=0, k_in=0))
    (server,) = _serve(tmp_path, none, how=Limits(tokens=64, requests=8, bases=2))
    cases: list[tuple[dict[str, handmade.Plan], int]] = [
        ({"ann": [SHARED], "cem": [("both", "left")]}, 5),
        ({"ann": [SHARED * 3]}, 17),
    ]
    for users, k_in in cases:
        other = handmade.bundle(engine.SHAPES, users, sizes=handmade.Sizes(k_in=k_in), seed=5)
        path = tmp_path / f"{k_in}.soppu"
        new = other.save(path)
        if k_in > 16:
            with pytest.raises(BundleError, match=r"shared ranks 6, 17, .* started with 16, 16"):
                server.control.add_bundle(path, bundle_id=new)
        else:
            server.control.add_bundle(path, bundle_id=new)
            for user in other.users:
                assert _same(server.change(f"{user}@{new}"), engine.change(other, user, "block.qkv_proj"))
    server.control.close()


def test_a_bundle_changed_while_the_server_started_is_noticed(tmp_path: Path) -> None:
    bundle, path, bundle_id = _second(tmp_path)
    control = Control(Settings(path, tmp_path / "state"), base_hash=tiny.BASE_HASH)
    assert control.bank.active == bundle_id == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match="changed while the server started"):
        control.connect(Engine(lambda *_: ["0" * 64], set))
    control.close()
    assert len(bundle.users) == 2
