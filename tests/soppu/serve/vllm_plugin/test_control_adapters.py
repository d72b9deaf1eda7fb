"""Adapters that come while a server runs: projected on its bases, or kept with numbers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import compress
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.options import CompressOptions
from soppu.errors import AdapterError, BundleError
from soppu.serve.layers import kernels, native
from soppu.serve.vllm_plugin.frontend import projecting
from soppu.serve.vllm_plugin.worker.static import Limits
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine
from tests.soppu.serve.vllm_plugin.commanded import (
    MIXED,
    SHARED,
    Server,
    _adapter,
    _same,
    _second,
    _serve,
    _wait,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from _serve(tmp_path, handmade.bundle(engine.SHAPES, {"ann": [SHARED], "bob": [SHARED]}))


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
