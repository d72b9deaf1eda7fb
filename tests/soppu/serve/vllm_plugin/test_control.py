"""Bundles and adapters that come and go while requests are under way; one real worker, no engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import compress
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.options import CompressOptions
from soppu.cores import folder as core_folder
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError, BundleError, RequestError
from soppu.serve.bank.holdings import Answer
from soppu.serve.bank.newcomers import Asked, Newcomers
from soppu.serve.layers import kernels, native
from soppu.serve.layers.kernels import Kernel
from soppu.serve.vllm_plugin import state
from soppu.serve.vllm_plugin.frontend import projecting
from soppu.serve.vllm_plugin.frontend.control import Control, Engine
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker.resident import Form
from soppu.serve.vllm_plugin.worker.static import Limits
from soppu.serve.vllm_plugin.worker.worker import Worker
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine

SHARED = ("shared", "shared", "shared")


MIXED: dict[str, handmade.Plan] = {
    "ann": [SHARED],
    "bob": [("own", "own")],
    "cem": [("both", "left"), ("right",), None, SHARED],
}


@dataclass
class Server:
    """A control and the worker it commands; `busy` is what requests are on."""

    control: Control
    worker: Worker
    busy: set[int] = field(default_factory=set)

    def change(self, name: str, layer: str = "block.qkv_proj") -> Tensor:
        """What a name adds to a layer's weight now, (o, i)."""
        found = self.control.bank.resolve(name)
        assert found is not None
        return self.of_row(found.row, layer)

    def of_row(self, row: int, layer: str = "block.qkv_proj") -> Tensor:
        inputs = engine.INPUTS[layer]
        self.worker.step.begin(np.array([row]), np.array([inputs]))
        y = torch.zeros(inputs, sum(engine.SHAPES[name][0] for name in engine.PACKED[layer]))
        numbers = [linear.name for linear in self.worker.step.linears]
        self.worker.step.apply(torch.eye(inputs), y, numbers.index(layer))
        return y.mT.double()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from _serve(tmp_path, handmade.bundle(engine.SHAPES, {"ann": [SHARED], "bob": [SHARED]}))


def _serve(
    folder: Path, bundle: Bundle, *, how: Kernel | Limits = kernels.plain, **changes: Any
) -> Iterator[Server]:
    path = folder / "first.soppu"
    bundle_id = bundle.save(path)
    settings = Settings(**({"bundle": path, "state": folder / "state", "spare_rows": 2} | changes))
    server = begin(settings, how)
    assert server.control.bank.active == bundle_id
    yield server
    server.control.close()


def begin(settings: Settings, how: Kernel | Limits = kernels.plain) -> Server:
    """A server as it starts: the worker reads what the API server left in the state."""
    form = Form(torch.float32, torch.device("cpu"), spare=settings.spare_rows)
    control = Control(settings, base_hash=tiny.BASE_HASH)
    worker = Worker(engine.linears(), how, form, bundles=state.kept_bundles(control.state.folder))
    server = Server(control, worker)
    server.control.connect(Engine(lambda name, *args: [getattr(worker, name)(*args)], lambda: server.busy))
    return server


def _second(folder: Path, users: tuple[str, ...] = ("ann", "cem")) -> tuple[Bundle, Path, str]:
    bundle = handmade.bundle(engine.SHAPES, {user: [SHARED] for user in users}, seed=7)
    path = folder / "second.soppu"
    return bundle, path, bundle.save(path)


def _same(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)


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


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


def _adapter(bundle: Bundle, user: str, *, noise: float = 0.0, seed: int = 0) -> LoraAdapter:
    """A pair that changes what the bundle's user changes; `noise` of it lies outside the bases."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, pair in bundle.reconstruct(user).pairs.items():
        off = torch.randn(pair.B.shape, generator=g)
        B = pair.B + off * (noise * pair.B.norm() / off.norm())
        pairs[name] = LoraPair(A=2 * pair.A, B=0.5 * B)
    return LoraAdapter(pairs, base_model="tiny", base_hash=tiny.BASE_HASH)


def test_a_runtime_adapter_inside_the_basis_joins_and_one_outside_is_refused(
    server: Server, tmp_path: Path
) -> None:
    bundle = Bundle.load(tmp_path / "first.soppu")
    server.control.settings = replace(server.control.settings, max_error=0.05)
    adapters.write(_adapter(bundle, "bob"), tmp_path / "new")
    server.control.add_adapter("dee", tmp_path / "new")
    assert _same(server.change("dee"), server.change("bob"))
    assert server.control.bank.names() == ("ann", "bob", "dee")
    adapters.write(_adapter(bundle, "bob", noise=0.5), tmp_path / "far")
    with pytest.raises(
        AdapterError, match=r"adapter 'eve': relative error 0\.\d+ .*at most 0\.0500 is allowed"
    ):
        server.control.add_adapter("eve", tmp_path / "far")
    with pytest.raises(AdapterError, match="has a user of that name"):
        server.control.add_adapter("ann", tmp_path / "new")
    server.control.drop_adapter("dee")
    assert server.control.bank.resolve("dee") is None
    with pytest.raises(AdapterError, match="no adapter 'dee' is loaded"):
        server.control.drop_adapter("dee")
    with pytest.raises(AdapterError, match="a user of the active bundle"):
        server.control.drop_adapter("ann")


def test_with_own_numbers_bundles_are_switched_and_adapters_projected_all_the_same(tmp_path: Path) -> None:
    """Cores, own numbers and both, in both bundles."""
    (server,) = _serve(tmp_path, handmade.bundle(engine.SHAPES, MIXED), max_error=0.05)
    first, old = Bundle.load(tmp_path / "first.soppu"), server.control.bank.active
    users = list(MIXED.values())
    other = dict(zip(("bob", "cem", "dee"), users, strict=True))
    second = handmade.bundle(engine.SHAPES, other, seed=7)
    path = tmp_path / "second.soppu"
    new = second.save(path)
    adapters.write(_adapter(first, "ann"), tmp_path / "new")
    server.control.add_adapter("eve", tmp_path / "new")
    server.control.add_bundle(path, bundle_id=new)
    for layer in engine.INPUTS:
        wanted = {f"{user}@{old}": engine.change(first, user, layer) for user in first.users}
        wanted |= {f"{user}@{new}": engine.change(second, user, layer) for user in second.users}
        wanted["eve"] = engine.change(first, "ann", layer)
        assert all(_same(server.change(name, layer), change) for name, change in wanted.items())
    server.control.drop_adapter("eve")
    server.control.activate(new)
    server.control.drop_bundle(old)
    _wait(lambda: len(server.worker.step.residents) == 1)
    assert _same(server.change("dee"), engine.change(second, "dee", "block.qkv_proj"))
    server.control.close()


@pytest.mark.parametrize("kernel", ["plain", "native", "static"])
def test_an_adapter_off_the_basis_keeps_numbers_of_its_own_where_users_do(
    tmp_path: Path, kernel: str
) -> None:
    if kernel == "native" and (why := native.load()):
        pytest.skip(f"no compiled kernel: {why}")
    how = {"plain": kernels.plain, "native": kernels.native, "static": Limits(tokens=64, requests=8, bases=2)}
    (server,) = _serve(tmp_path, handmade.bundle(engine.SHAPES, MIXED), how=how[kernel], max_error=0.05)
    first, control = Bundle.load(tmp_path / "first.soppu"), server.control
    far = {name: _adapter(first, "bob", noise=3.0, seed=seed) for seed, name in enumerate(("eve", "fay"))}
    for name, adapter in far.items():
        adapters.write(adapter, tmp_path / name)
        control.add_adapter(name, tmp_path / name)

    def held(name: str, adapter: LoraAdapter) -> bool:
        layer = "block.qkv_proj"
        whole = []
        for module in engine.PACKED[layer]:
            pair = adapter.pairs.get(module)
            whole.append(torch.zeros(engine.SHAPES[module]) if pair is None else pair.delta())
        wanted = torch.cat(whole).double()
        return bool((server.change(name, layer) - wanted).norm() < 0.03 * wanted.norm())

    assert all(held(name, adapter) for name, adapter in far.items())
    for user in first.users:
        assert _same(server.change(user), engine.change(first, user, "block.qkv_proj"))
    adapters.write(_adapter(first, "ann"), tmp_path / "near")
    control.drop_adapter("eve")
    control.add_adapter("gus", tmp_path / "near")  # in the row of cores that eve's numbers were beside
    assert _same(server.change("gus"), engine.change(first, "ann", "block.qkv_proj")) and held(
        "fay", far["fay"]
    )
    control.drop_adapter("gus")
    control.add_adapter("eve", tmp_path / "eve")
    assert held("eve", far["eve"]) and held("fay", far["fay"])
    control.settings = replace(control.settings, max_error=0.001)
    with pytest.raises(AdapterError, match=r"'hal': relative error .* compress it together with the others"):
        control.add_adapter("hal", tmp_path / "eve")
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


def test_an_adapter_is_projected_where_nobody_uses_the_basis(tmp_path: Path) -> None:
    """All have own numbers, and there are bases: an adapter inside them is served."""
    plans: dict[str, handmade.Plan] = {"ann": [("own",), ()], "bob": [("own", "left")]}
    (server,) = _serve(tmp_path, handmade.bundle(engine.SHAPES, plans), max_error=0.05)
    shared = handmade.bundle(engine.SHAPES, {"cem": [SHARED]})  # of the same seed, so of the same bases
    adapters.write(_adapter(shared, "cem"), tmp_path / "new")
    server.control.add_adapter("cem", tmp_path / "new")
    for layer in engine.INPUTS:
        assert _same(server.change("cem", layer), engine.change(shared, "cem", layer))
    server.control.close()


def test_spare_rows_are_used_again_only_when_no_request_is_on_them(server: Server, tmp_path: Path) -> None:
    bundle = Bundle.load(tmp_path / "first.soppu")
    server.control.settings = replace(server.control.settings, max_error=0.05)
    adapters.write(_adapter(bundle, "bob"), tmp_path / "new")
    for name in ("one", "two"):
        server.control.add_adapter(name, tmp_path / "new")
    with pytest.raises(AdapterError, match="all 2 spare rows are taken"):
        server.control.add_adapter("three", tmp_path / "new")
    was = server.control.bank.resolve("one")
    assert was is not None
    server.busy.add(was.row)
    server.control.drop_adapter("one")
    with pytest.raises(AdapterError, match="all 2 spare rows are taken"):
        server.control.add_adapter("three", tmp_path / "new")
    server.busy.clear()
    server.control.add_adapter("three", tmp_path / "new")
    assert server.control.bank.resolve("three").row == was.row  # type: ignore[union-attr]


def test_a_basis_with_a_runtime_adapter_on_it_stays(server: Server, tmp_path: Path) -> None:
    bundle, first = Bundle.load(tmp_path / "first.soppu"), server.control.bank.active
    server.control.settings = replace(server.control.settings, max_error=0.05)
    adapters.write(_adapter(bundle, "bob"), tmp_path / "new")
    server.control.add_adapter("dee", tmp_path / "new")
    _, path, bundle_id = _second(tmp_path, ("ann", "dee"))
    server.control.add_bundle(path, bundle_id=bundle_id)
    with pytest.raises(BundleError, match="user 'dee' has the name of a loaded adapter"):
        server.control.activate(bundle_id)
    server.control.activate("")
    with pytest.raises(BundleError, match="adapter 'dee' is served on its basis"):
        server.control.drop_bundle(first)
    assert server.change("dee").any()


def test_the_projection_is_the_best_there_is_and_its_error_the_true_one() -> None:
    g = torch.Generator().manual_seed(0)
    members = {
        f"u{n}": LoraAdapter(
            {
                name: LoraPair(torch.randn(3, i, generator=g), torch.randn(o, 3, generator=g))
                for name, (o, i) in engine.SHAPES.items()
            },
            base_model="tiny",
            base_hash=tiny.BASE_HASH,
        )
        for n in range(6)
    }
    options = CompressOptions(method="cluster", clusters=2, rank=6, device="cpu")
    bundle = compress({name: a for name, a in members.items() if name != "u5"}, options)
    made = projecting.project(members["u5"], Shelf.of(bundle), who="u5")
    lost = whole = 0.0
    for name, pair in members["u5"].pairs.items():
        U, V = (side.double() for side in bundle.matrices(name, made.cluster) if side is not None)
        D = pair.B.double() @ pair.A.double()
        best = U @ torch.linalg.pinv(U) @ D @ torch.linalg.pinv(V).mT @ V.mT
        assert torch.allclose(U @ made.cores[name].double() @ V.mT, best, atol=1e-4)
        lost, whole = lost + float((D - best).square().sum()), whole + float(D.square().sum())
    assert made.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_a_bundle_changed_while_the_server_started_is_noticed(tmp_path: Path) -> None:
    bundle, path, bundle_id = _second(tmp_path)
    control = Control(Settings(path, tmp_path / "state"), base_hash=tiny.BASE_HASH)
    assert control.bank.active == bundle_id == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match="changed while the server started"):
        control.connect(Engine(lambda *_: ["0" * 64], set))
    control.close()
    assert len(bundle.users) == 2
