"""A basis around the shared adapter: it holds that exactly, and what is drawn beside it is of the seed."""

from __future__ import annotations

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.around import around
from soppu.cores.basis import validate
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.errors import AdapterError

SHAPES = {"l.0.q_proj": (6, 9), "l.0.down_proj": (7, 20), "l.1.down_proj": (7, 20)}


def a_shared(rank: int = 2, *, seed: int = 0) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, i, generator=draw), torch.randn(o, rank, generator=draw))
        for name, (o, i) in SHAPES.items()
    }
    return LoraAdapter(pairs, "m", "b" * 64, fan_in_fan_out=True)


def test_it_tells_the_shared_adapter_exactly_and_is_wide_where_it_is_asked_to_be() -> None:
    shared = a_shared()
    basis = around(shared, k=3, modules=["down_proj"], seed=3)
    assert basis.core_shapes() == {n: (2, 2) if "q_proj" in n else (5, 5) for n in SHAPES}
    assert basis.common == 2
    assert basis.free_shapes() == {n: (0, 0) if "q_proj" in n else (3, 3) for n in SHAPES}
    validate(basis, who="basis")
    assert basis.module_shapes() == SHAPES and basis.base == shared.base and basis.fan_in_fan_out
    for side in (side for sides in basis.sides.values() for side in sides):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1]), atol=1e-5, rtol=0)
    told = from_lora(shared, basis)
    assert told.error < 1e-6
    back = CoreInBasis(told.core, basis).to_lora()
    for name, pair in shared.pairs.items():
        torch.testing.assert_close(back.pairs[name].delta(), pair.delta(), atol=1e-4, rtol=1e-4)
        outside = told.core.cores[name].clone()
        outside[:2, :2] = 0
        assert outside.abs().max() < 1e-5  # the drawn directions have none of it


def test_no_module_named_is_every_module_and_no_side_is_wider_than_its_layer() -> None:
    basis = around(a_shared(), k=8, modules=(), seed=0)
    assert basis.core_shapes() == {"l.0.q_proj": (6, 9), "l.0.down_proj": (7, 10), "l.1.down_proj": (7, 10)}


def test_what_is_drawn_is_of_the_seed_and_differs_between_modules() -> None:
    made = [around(a_shared(), k=4, modules=["down_proj"], seed=seed) for seed in (1, 1, 2)]
    assert made[0].id == made[1].id != made[2].id
    first, second = (made[0].sides[f"l.{n}.down_proj"][1][:, 2:] for n in (0, 1))
    assert (first - second).abs().max() > 0.1
    other = around(a_shared(seed=5), k=4, modules=["down_proj"], seed=1)
    assert other.id != made[0].id


def test_an_adapter_of_no_change_yet_is_held_too() -> None:
    begun = a_shared()
    pairs = {name: LoraPair(pair.A, torch.zeros_like(pair.B)) for name, pair in begun.pairs.items()}
    basis = around(LoraAdapter(pairs, "m", "b" * 64), k=4, modules=(), seed=0)
    assert all(bool(torch.isfinite(side).all()) for sides in basis.sides.values() for side in sides)
    assert basis.core_shapes()["l.0.down_proj"] == (6, 6)


def test_what_it_cannot_be_made_of_is_named() -> None:
    with pytest.raises(AdapterError, match=r"no module up_proj; there are down_proj, q_proj"):
        around(a_shared(), k=4, modules=["up_proj", "q_proj"], seed=0)
    pairs = dict(a_shared().pairs) | {"l.0.q_proj": a_shared(3).pairs["l.0.q_proj"]}
    with pytest.raises(AdapterError, match=r"ranks 2, 3, allowed: one for all"):
        around(LoraAdapter(pairs), k=1, modules=(), seed=0)
