"""Cores in a basis: what is exact, what is lost, what a change of the basis does, and their files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores import core as cores
from soppu.cores import folder as folders
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.cores.projecting import carry, from_lora
from soppu.errors import AdapterError

HASH = "b" * 64
SHAPES = {"model.layers.2.self_attn.q_proj": (12, 10), "model.layers.3.mlp.down_proj": (10, 14)}


def a_basis(k_out: int, k_in: int, *, seed: int = 0, base_hash: str = HASH) -> CoreBasis:
    """Of unit columns that are not orthogonal, as a bundle's quantised ones are not."""
    draw = torch.Generator().manual_seed(seed)
    sides = {}
    for name, (o, i) in SHAPES.items():
        u, v = torch.randn(o, min(k_out, o), generator=draw), torch.randn(i, min(k_in, i), generator=draw)
        sides[name] = (u / u.norm(dim=0), v / v.norm(dim=0))
    return CoreBasis(sides, "tiny", base_hash)


def an_adapter(rank: int = 3, *, seed: int = 7) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, i, generator=draw), torch.randn(o, rank, generator=draw))
        for name, (o, i) in SHAPES.items()
    }
    return LoraAdapter(pairs, "tiny", HASH)


def a_core(basis: CoreBasis, *, own: int = 0, seed: int = 3) -> CoreAdapter:
    draw = torch.Generator().manual_seed(seed)
    made = cores.zero(basis)
    return dataclasses.replace(
        made,
        cores={name: torch.randn(one.shape, generator=draw) for name, one in made.cores.items()},
        own=an_adapter(own).pairs if own else {},
    )


def apart(one: LoraAdapter, other: LoraAdapter) -> float:
    """Relative Frobenius distance, by dense matrices in float64."""
    dense = [{n: p.B.double() @ p.A.double() for n, p in a.pairs.items()} for a in (one, other)]
    left = sum(float((dense[0][name] - dense[1][name]).square().sum()) for name in SHAPES)
    whole = sum(float(dense[1][name].square().sum()) for name in SHAPES)
    return (left / whole) ** 0.5


def test_a_basis_of_full_width_takes_any_adapter_exactly() -> None:
    basis, adapter = a_basis(99, 99), an_adapter()
    found = from_lora(adapter, basis)
    assert found.error < 1e-5
    assert apart(CoreInBasis(found.core, basis).to_lora(), adapter) < 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 99))
def test_what_lies_in_the_span_is_projected_exactly(k_out: int, k_in: int, own: int, seed: int) -> None:
    basis = a_basis(k_out, k_in, seed=seed)
    inside = CoreInBasis(a_core(basis, seed=seed), basis).to_lora()
    assert {pair.rank for pair in inside.pairs.values()} == {min(k_out, k_in)}
    found = from_lora(inside, basis, own_rank=own)
    assert found.error < 1e-5 and not found.core.own  # round-off is nobody's own direction


def test_the_error_is_that_of_the_dense_difference_and_own_ranks_make_it_less() -> None:
    basis, adapter = a_basis(5, 6), an_adapter(3)
    errors = []
    for rank in range(4):
        found = from_lora(adapter, basis, own_rank=rank)
        assert found.error == pytest.approx(
            apart(CoreInBasis(found.core, basis).to_lora(), adapter), rel=1e-4, abs=1e-6
        )
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True) and 0 < errors[3] < errors[0] < 1


def test_it_is_the_nearest_core() -> None:
    basis, adapter = a_basis(4, 4), an_adapter()
    found = from_lora(adapter, basis)
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        moved = {n: s + 0.01 * torch.randn(s.shape, generator=draw) for n, s in found.core.cores.items()}
        other = CoreInBasis(dataclasses.replace(found.core, cores=moved), basis)
        assert apart(other.to_lora(), adapter) > found.error


def test_modules_that_the_basis_lacks_count_in_the_error() -> None:
    whole, adapter = a_basis(99, 99), an_adapter()
    name = next(iter(SHAPES))
    part = dataclasses.replace(whole, sides={name: whole.sides[name]})
    found = from_lora(adapter, part)
    missed, there = (adapter.pairs[n].delta().double().square().sum() for n in reversed(SHAPES))
    assert found.error == pytest.approx(float((missed / (missed + there)).sqrt()), rel=1e-5)


def test_another_gauge_of_the_basis_changes_nothing_once_the_core_is_carried_over() -> None:
    basis = a_basis(5, 4)
    draw = torch.Generator().manual_seed(9)
    turned = CoreBasis(
        {
            name: (
                u @ torch.randn(u.shape[1], u.shape[1], generator=draw),
                v @ torch.randn(v.shape[1], v.shape[1], generator=draw),
            )
            for name, (u, v) in basis.sides.items()
        },
        "tiny",
        HASH,
    )
    core = CoreInBasis(a_core(basis, own=2), basis)
    carried = carry(core, turned)
    assert turned.id != basis.id and carried.basis_id == turned.id
    assert apart(CoreInBasis(carried, turned).to_lora(), core.to_lora()) < 1e-4


def test_an_id_is_of_every_number_and_of_the_base_model() -> None:
    basis = a_basis(3, 3)
    same = CoreBasis(dict(reversed(basis.sides.items())), "elsewhere", HASH)
    assert basis.id == same.id != a_basis(3, 3, base_hash="c" * 64).id
    name = next(iter(SHAPES))
    u, v = basis.sides[name]
    assert dataclasses.replace(basis, sides={**basis.sides, name: (u + 1e-6, v)}).id != basis.id
    core = a_core(basis)
    assert core.id == a_core(basis).id != a_core(basis, own=1).id


def changed(**fields: object) -> Callable[[CoreAdapter], CoreAdapter]:
    return lambda core: dataclasses.replace(core, **fields)  # type: ignore[arg-type]


NAME = next(iter(SHAPES))
FAULTS: list[tuple[Callable[[CoreAdapter], CoreAdapter], str]] = [
    (changed(basis_id="u-0123456789abcdef"), r"ann: the core is told in basis u-0123456789abcdef, found"),
    (changed(base_hash="c" * 64), "ann: made for base model cccccccccccc"),
    (changed(fan_in_fan_out=True), "ann: fan_in_fan_out is True, the basis has False"),
    (changed(cores={}), "ann: model.layers.2.self_attn.q_proj: the basis has it"),
    (
        lambda c: dataclasses.replace(c, cores={**c.cores, NAME: torch.zeros(2, 4)}),
        r"the core is \(2, 4\), the basis has room for \(3, 4\)",
    ),
    (
        lambda c: dataclasses.replace(c, cores={**c.cores, NAME: torch.full((3, 4), torch.nan)}),
        "q_proj.core holds NaN or Inf",
    ),
    (
        lambda c: dataclasses.replace(c, cores={**c.cores, NAME: torch.zeros(3, 4).half()}),
        "ann: .*q_proj.core is torch.float16, allowed: torch.float32",
    ),
    (changed(own={NAME: LoraPair(torch.tensor(1.0), torch.zeros(12, 1))}), r"of its own the core has A \(\)"),
    (changed(own=an_adapter(5).pairs), r"allowed: ranks 1 to 4 of \(12, 10\)"),
    (changed(own={"model.layers.9.x": LoraPair(torch.zeros(1, 2), torch.zeros(2, 1))}), "layers.9.x"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_core_that_does_not_fit_its_basis_is_refused_by_name(
    change: Callable[[CoreAdapter], CoreAdapter], message: str
) -> None:
    basis = a_basis(3, 4)
    with pytest.raises(AdapterError, match=message):
        CoreInBasis(change(a_core(basis)), basis, who="ann")


def test_an_adapter_that_cannot_be_told_in_the_basis_is_refused_by_name() -> None:
    adapter = an_adapter()
    with pytest.raises(AdapterError, match="ann: made for base model"):
        from_lora(adapter, a_basis(3, 3, base_hash="c" * 64), who="ann")
    with pytest.raises(AdapterError, match="own_rank = 5, allowed: 0 to 4"):
        from_lora(adapter, a_basis(3, 3), own_rank=5)
    wrong = {**adapter.pairs, NAME: LoraPair(torch.ones(1, 3), torch.ones(3, 1))}
    with pytest.raises(AdapterError, match=r"ann: model.*shape \(3, 3\), the basis has \(12, 10\)"):
        from_lora(dataclasses.replace(adapter, pairs=wrong), a_basis(3, 3), who="ann")


# ---- files


def test_a_core_comes_back_from_its_folder_and_leaves_as_a_plain_peft_folder(tmp_path: Path) -> None:
    basis = a_basis(4, 3)
    core = a_core(basis, own=2)
    folders.write(core, tmp_path / "core")
    back = folders.read(tmp_path / "core")
    assert back.content_hash() == core.content_hash() and back.id == core.id
    assert json.loads((tmp_path / "core" / "core.json").read_text())["id"] == core.id
    lora = CoreInBasis(back, basis).to_lora()
    adapters.write(lora, tmp_path / "peft")
    assert apart(adapters.read(tmp_path / "peft"), CoreInBasis(core, basis).to_lora()) == 0


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "core.json").unlink(), "core.json: no such file"),
        (lambda f: (f / "core.safetensors").unlink(), "core.safetensors: no such file"),
        (lambda f: (f / "core.safetensors").write_bytes(b"x" * 9), "truncated or not safetensors"),
        (lambda f: (f / "core.json").write_text("[]"), "holds a list, expected an object"),
        (lambda f: _edit(f, format=2), "format 2, this version reads 1"),
        (lambda f: _edit(f, fan_in_fan_out="no"), "fan_in_fan_out = 'no', expected a bool"),
        (lambda f: _edit(f, basis_id="u-0123456789abcdef"), "belongs to other numbers"),
        (
            lambda f: folders.write(a_core(a_basis(2, 2), seed=1), f) or _edit(f, content="0" * 64),
            "other numbers",
        ),
        (lambda f: adapters.write(an_adapter(), f) or _swap(f), "allowed: <module>.core"),
    ],
)
def test_a_damaged_folder_is_told_by_name(
    tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    folders.write(a_core(a_basis(2, 2)), tmp_path)
    harm(tmp_path)
    with pytest.raises(AdapterError, match=message):
        folders.read(tmp_path)


def _edit(folder: Path, **values: object) -> None:
    path = folder / "core.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _swap(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "core.safetensors")
