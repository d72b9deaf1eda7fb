"""A basis around the shared adapter: it holds that exactly, and others stand beside as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.around import around
from soppu.cores.basis import CoreBasis, drawn, validate
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.errors import AdapterError

SHAPES = {"l.0.q_proj": (6, 9), "l.0.down_proj": (7, 20), "l.1.down_proj": (7, 20)}
DOWN = {name: shape for name, shape in SHAPES.items() if "down" in name}
HASH = "b" * 64


def a_shared(rank: int = 2, *, seed: int = 0) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, i, generator=draw), torch.randn(o, rank, generator=draw))
        for name, (o, i) in SHAPES.items()
    }
    return LoraAdapter(pairs, "m", HASH, fan_in_fan_out=True)


def beside(k: int, *, seed: int = 3) -> CoreBasis:
    return drawn(DOWN, k, seed=seed, base_hash=HASH)


def test_it_tells_the_shared_adapter_exactly_and_has_the_others_beside_it() -> None:
    shared, others = a_shared(), beside(3)
    basis = around(shared, others)
    validate(basis, who="basis")
    assert basis.core_shapes() == {n: (5, 5) if n in DOWN else (2, 2) for n in SHAPES}
    assert basis.common == 2
    assert basis.free_shapes() == {n: (3, 3) if n in DOWN else (0, 0) for n in SHAPES}
    assert basis.module_shapes() == SHAPES and basis.base == shared.base and basis.fan_in_fan_out
    told = from_lora(shared, basis)
    assert told.error < 1e-6
    back = CoreInBasis(told.core, basis).to_lora()
    for name, pair in shared.pairs.items():
        torch.testing.assert_close(back.pairs[name].delta(), pair.delta(), atol=1e-4, rtol=1e-4)
        outside = told.core.cores[name].clone()
        outside[:2, :2] = 0
        assert outside.abs().max() < 1e-4  # the directions beside have none of it
    for name in DOWN:
        for side, other in zip(basis.sides[name], others.sides[name], strict=True):
            torch.testing.assert_close(side[:, :2].mT @ side[:, :2], torch.eye(2))
            assert torch.equal(side[:, 2:], other)


def test_a_core_in_it_is_the_shared_adapter_and_what_is_beside() -> None:
    shared, others = a_shared(), beside(3)
    basis = around(shared, others)
    core = from_lora(shared, basis).core
    own = {name: torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) for name in DOWN}
    cores = {name: s.clone() for name, s in core.cores.items()}
    for name, s in own.items():
        cores[name][2:, 2:] = s
    told = CoreInBasis(dataclasses.replace(core, cores=cores), basis).to_lora()
    for name, (u, v) in others.sides.items():
        wanted = shared.pairs[name].delta() + u @ own[name] @ v.mT
        torch.testing.assert_close(told.pairs[name].delta(), wanted, atol=1e-4, rtol=1e-4)


def test_no_side_is_wider_than_its_layer() -> None:
    basis = around(a_shared(), beside(9))
    assert basis.core_shapes()["l.0.down_proj"] == (7, 11)


def test_an_adapter_of_no_change_yet_is_held_too() -> None:
    pairs = {n: LoraPair(pair.A, torch.zeros_like(pair.B)) for n, pair in a_shared().pairs.items()}
    basis = around(LoraAdapter(pairs, "m", HASH), beside(4))
    assert all(bool(torch.isfinite(side).all()) for sides in basis.sides.values() for side in sides)


def test_what_it_cannot_be_made_of_is_named() -> None:
    with pytest.raises(AdapterError, match=r"up_proj: the shared adapter has no such module"):
        around(a_shared(), drawn({"l.0.up_proj": (7, 7)}, 2, seed=0, base_hash=HASH))
    with pytest.raises(AdapterError, match=r"down_proj: the shared adapter has \(7, 20\), needed: \(7, 8\)"):
        around(a_shared(), drawn({"l.0.down_proj": (7, 8)}, 2, seed=0, base_hash=HASH))
    with pytest.raises(AdapterError, match="the directions beside are for"):
        around(a_shared(), drawn(DOWN, 2, seed=0, base_hash="c" * 64))
    pairs = dict(a_shared().pairs) | {"l.0.q_proj": a_shared(3).pairs["l.0.q_proj"]}
    with pytest.raises(AdapterError, match=r"ranks 2, 3, allowed: one for all"):
        around(LoraAdapter(pairs, "m", HASH), beside(2))
