"""A basis that grows: what it had stays bit for bit; what is added is the most that adapters have outside."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.around import around
from soppu.cores.basis import CoreBasis, drawn, validate
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.cores.grown import grown
from soppu.cores.projecting import Carrier, from_lora
from soppu.errors import AdapterError

SHAPES = {"l.0.q_proj": (12, 9), "l.0.down_proj": (14, 20), "l.1.down_proj": (14, 20)}
HASH = "b" * 64


def an_adapter(seed: int, rank: int = 2, **changes: object) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, i, generator=draw), torch.randn(o, rank, generator=draw))
        for name, (o, i) in SHAPES.items()
    }
    return dataclasses.replace(LoraAdapter(pairs, "m", HASH), **changes)  # type: ignore[arg-type]


def a_basis(k: int = 3) -> CoreBasis:
    return dataclasses.replace(drawn(SHAPES, k, seed=3, base_hash=HASH), base_model="m")


def outside(side: torch.Tensor, found: torch.Tensor) -> float:
    """Squared norm of what columns have outside a span, by least squares."""
    side, found = side.double(), found.double()
    return float((found - side @ torch.linalg.lstsq(side, found).solution).square().sum())


def test_what_it_had_stays_first_and_the_rest_is_orthonormal_and_outside() -> None:
    basis = a_basis()
    more = grown(basis, [an_adapter(0), an_adapter(1)], by=2)
    validate(more, who="grown")
    assert more.core_shapes() == dict.fromkeys(SHAPES, (5, 5)) and more.base == basis.base
    for name, both in more.sides.items():
        for old, new in zip(basis.sides[name], both, strict=True):
            assert torch.equal(new[:, :3], old)
            torch.testing.assert_close(new.mT @ new, torch.eye(5), atol=1e-5, rtol=0)


def test_with_as_many_directions_as_the_adapters_have_they_are_spanned() -> None:
    adapters = [an_adapter(seed) for seed in range(3)]
    basis = a_basis()
    more = grown(basis, adapters, by=100)
    assert more.core_shapes() == dict.fromkeys(SHAPES, (9, 9))  # 3, and 3 x rank 2: there is room for all
    for one in adapters:
        assert from_lora(one, basis).error > 0.5 and from_lora(one, more).error < 1e-6
    assert grown(more, adapters, by=5).id == more.id  # nothing is left to grow by
    assert grown(basis, [], by=5).id == basis.id


def test_who_is_told_in_the_old_basis_is_told_exactly_in_the_new_one() -> None:
    basis = a_basis()
    draw = torch.Generator().manual_seed(7)
    cores = {name: torch.randn(3, 3, generator=draw) for name in SHAPES}
    core = CoreInBasis(CoreAdapter(basis.id, cores, {}, "m", HASH, False), basis)
    carried = Carrier(basis, grown(basis, [an_adapter(0)], by=4)).carry(core)
    assert carried.error < 1e-6
    for name, there in carried.core.cores.items():
        torch.testing.assert_close(there[:3, :3], cores[name], atol=1e-6, rtol=1e-6)
        assert there[3:].abs().max() < 1e-6 and there[:, 3:].abs().max() < 1e-6


@pytest.mark.parametrize("by", [1, 3])
def test_nothing_of_as_many_directions_leaves_less(by: int) -> None:
    """Against the slow reference, a dense SVD of what is outside, and against random directions."""
    adapters = [an_adapter(seed) for seed in range(4)]
    adapters[2] = dataclasses.replace(
        adapters[2], pairs={n: LoraPair(50 * p.A, p.B) for n, p in adapters[2].pairs.items()}
    )
    basis = a_basis()
    more = grown(basis, adapters, by=by)
    for name, both in more.sides.items():
        deltas = [one.pairs[name].delta().double() for one in adapters]
        deltas = [delta / delta.norm() for delta in deltas]  # a large one weighs no more than the others
        for place, found in enumerate((torch.cat(deltas, 1), torch.cat([d.mT for d in deltas], 1))):
            old = torch.linalg.qr(basis.sides[name][place].double())[0]
            values = torch.linalg.svdvals(found - old @ old.mT @ found)
            assert outside(both[place], found) == pytest.approx(float(values[by:].square().sum()), rel=1e-5)
            drawn_ = torch.randn(len(found), by, generator=torch.Generator().manual_seed(by)).double()
            assert outside(both[place], found) < outside(torch.cat([old, drawn_], 1), found)


def test_how_an_adapter_is_written_changes_nothing() -> None:
    one = an_adapter(0)
    turn = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    pairs = {n: LoraPair(torch.linalg.inv(turn) @ p.A, 7 * p.B @ turn) for n, p in one.pairs.items()}
    first, second = (
        grown(a_basis(), [adapter], by=2) for adapter in (one, dataclasses.replace(one, pairs=pairs))
    )
    for name, both in first.sides.items():
        for a, b in zip(both, second.sides[name], strict=True):
            torch.testing.assert_close(a[:, 3:] @ a[:, 3:].mT, b[:, 3:] @ b[:, 3:].mT, atol=1e-4, rtol=0)


def test_what_is_in_common_stays_so_and_its_modules_get_directions_too() -> None:
    down = {name: shape for name, shape in SHAPES.items() if "down" in name}
    basis = around(an_adapter(9), dataclasses.replace(drawn(down, 3, seed=3, base_hash=HASH), base_model="m"))
    more = grown(basis, [an_adapter(0)], by=2)
    assert more.common == basis.common == 2
    assert more.free_shapes() == {n: (5, 5) if n in down else (2, 2) for n in SHAPES}


def test_a_side_grows_no_further_than_it_has_room_and_adapters_without_a_module_say_nothing_of_it() -> None:
    wide = a_basis(9)  # all of q_proj's inputs
    more = grown(wide, [an_adapter(0), an_adapter(1)], by=4)
    assert more.core_shapes()["l.0.q_proj"] == (12, 9) and more.core_shapes()["l.0.down_proj"] == (13, 13)
    part = an_adapter(0)
    part = dataclasses.replace(part, pairs={"l.0.q_proj": part.pairs["l.0.q_proj"]})
    assert grown(a_basis(), [part], by=4).core_shapes() == {
        n: (5, 5) if "q_proj" in n else (3, 3) for n in SHAPES
    }
    nothing = {n: LoraPair(p.A, 0 * p.B) for n, p in part.pairs.items()}
    assert grown(a_basis(), [dataclasses.replace(part, pairs=nothing)], by=4).id == a_basis().id


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(AdapterError, match="grow by 0 directions, allowed: 1 or more"):
        grown(a_basis(), [an_adapter(0)], by=0)
    with pytest.raises(AdapterError, match="c{12}|other base"):
        grown(a_basis(), [an_adapter(0, base_hash="c" * 64)], by=1)
    cut = {n: LoraPair(p.A[:, :-1], p.B) for n, p in an_adapter(0).pairs.items()}
    with pytest.raises(AdapterError, match=r"q_proj: shape \(12, 8\), the basis has \(12, 9\)"):
        grown(a_basis(), [an_adapter(0, pairs=cut)], by=1)
