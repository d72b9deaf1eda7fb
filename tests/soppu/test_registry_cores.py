"""Cores in the registry: stored small, told in a basis that is stored too, and refused where it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError, RegistryError
from soppu.registry import Registry
from soppu.registry.catalogue import SCHEMA_VERSION, SchemaRow
from tests.share import share

MODEL = Base("tiny", "b" * 64)
SHAPES = {"model.layers.2.self_attn.q_proj": (48, 40), "model.layers.3.mlp.down_proj": (40, 56)}


def a_basis(seed: int = 0, *, base: Base = MODEL, k: int = 4) -> CoreBasis:
    draw = torch.Generator().manual_seed(seed)
    sides = {
        name: (torch.randn(o, k, generator=draw), torch.randn(i, k + 1, generator=draw))
        for name, (o, i) in SHAPES.items()
    }
    return CoreBasis(sides, base.name, base.hash)


def a_core(basis: CoreBasis, seed: int = 3, *, own: int = 0) -> CoreAdapter:
    draw = torch.Generator().manual_seed(seed)
    made = cores.zero(basis)
    pairs = {
        name: LoraPair(torch.randn(own, i, generator=draw), torch.randn(o, own, generator=draw))
        for name, (o, i) in SHAPES.items()
        if own
    }
    drawn = {name: torch.randn(one.shape, generator=draw) for name, one in made.cores.items()}
    return dataclasses.replace(made, cores=drawn, own=pairs)


def pairs(seed: int = 9) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    return LoraAdapter(
        {n: LoraPair(torch.randn(2, i, generator=draw), torch.ones(o, 2)) for n, (o, i) in SHAPES.items()},
        MODEL.name,
        MODEL.hash,
    )


@pytest.fixture(params=["local", "share"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "local":
        return Registry.open(tmp_path / "registry")
    root = share(tmp_path / "share")
    return Registry.open(root, catalogue=f"sqlite:///{tmp_path}/c.db", cache=tmp_path / "cache")


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry")


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("own", range(5))
def test_a_core_comes_back_bit_for_bit_and_is_told_as_its_exact_pairs(registry: Registry, own: int) -> None:
    basis = a_basis()
    core = a_core(basis, own=own)
    assert registry.put_basis(basis) == registry.put_basis(basis) == basis.id
    found = registry.put_adapter(core, user="ada", run="r", metrics={"loss": 2.0})
    assert found == registry.put_adapter(core, user="ada", run="r") == core.id == registry.current("ada")
    assert registry.get_core(found).content_hash() == core.content_hash()
    assert registry.get_basis(basis.id).content_hash() == basis.content_hash()
    told = CoreInBasis(core, basis).to_lora()
    assert registry.get_adapter(found).content_hash() == told.content_hash()
    assert [row.metrics for row in registry.history("ada")] == [{"loss": 2.0}]
    assert registry.told_in([found, "a-0"]) == {found: basis.id}
    numbers = 4 * core.parameters()
    assert numbers < registry.adapter_bytes(found) < numbers + 1000


def test_a_core_without_its_basis_is_refused_by_both_names_and_nothing_is_stored(registry: Registry) -> None:
    basis = a_basis()
    core = a_core(basis)
    with pytest.raises(RegistryError, match=f"'ada': core {core.id} .* unknown basis '{basis.id}'"):
        registry.put_adapter(core, user="ada")
    with pytest.raises(RegistryError, match="unknown user"):
        registry.current("ada")
    with pytest.raises(RegistryError, match=f"unknown adapter '{core.id}'"):
        registry.get_core(core.id)


def test_a_core_that_does_not_fit_its_basis_is_refused(local: Registry) -> None:
    basis = a_basis()
    local.put_basis(basis)
    core = a_core(basis)
    name = min(SHAPES)
    for wrong, said in (
        ({**core.cores, name: torch.zeros(3, 3)}, "room for"),
        ({name: core.cores[name]}, "a core for every module"),
        ({**core.cores, name: torch.full_like(core.cores[name], float("nan"))}, "NaN"),
    ):
        with pytest.raises(AdapterError, match=f"'ada'.*{said}"):
            local.put_adapter(dataclasses.replace(core, cores=wrong), user="ada")


def test_pairs_are_no_core_and_a_core_is_in_a_set_beside_them(registry: Registry) -> None:
    basis = a_basis()
    registry.put_basis(basis)
    held = {
        "ada": registry.put_adapter(a_core(basis), user="ada"),
        "bob": registry.put_adapter(pairs(), user="bob"),
    }
    assert registry.get_set(registry.freeze_current(MODEL)) == held
    assert registry.owner(held["ada"]) == ("ada",) and registry.told_in(held.values()) == {
        held["ada"]: basis.id
    }
    with pytest.raises(RegistryError, match=f"{held['bob']} is no core"):
        registry.get_core(held["bob"])


def test_a_core_that_does_not_know_its_base_model_is_known_by_its_basis(local: Registry) -> None:
    basis = a_basis()
    local.put_basis(basis)
    mute = dataclasses.replace(a_core(basis), base_hash="")
    assert local.current_set(base=MODEL) == {}
    found = local.put_adapter(mute, user="ada")
    assert local.current_set(base=Base("another name", MODEL.hash)) == {"ada": found}


def test_a_basis_in_force_is_the_last_of_its_base_model(registry: Registry) -> None:
    other = Base("other", "c" * 64)
    first, second, elsewhere = a_basis(1), a_basis(2), a_basis(3, base=other)
    for basis in (first, second, elsewhere):
        registry.put_basis(basis)
    assert registry.current_basis(MODEL) == ""
    for basis in (first, elsewhere, second, second):
        registry.use_basis(basis.id)
    assert registry.current_basis(MODEL) == second.id
    assert registry.current_basis(Base("renamed", MODEL.hash)) == second.id
    assert registry.current_basis(other) == elsewhere.id
    registry.use_basis(first.id)  # back to an older one
    assert registry.current_basis(MODEL) == first.id
    assert [one for one, _ in registry.basis_uses()] == [b.id for b in (first, elsewhere, second, first)]
    with pytest.raises(RegistryError, match="unknown basis 'u-0'"):
        registry.use_basis("u-0")


def test_a_damaged_basis_is_refused_by_name_by_all_who_need_it(local: Registry, tmp_path: Path) -> None:
    basis = a_basis()
    found = [local.put_basis(basis), local.put_adapter(a_core(basis), user="ada")]
    path = tmp_path / "registry" / "bases" / basis.id
    whole = path.read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b""):
        overwrite(path, broken)
        again = Registry.open(tmp_path / "registry")
        for ask in (
            lambda: again.get_basis(basis.id),  # noqa: B023 - asked at once
            lambda: again.get_adapter(found[1]),  # noqa: B023
            lambda: again.put_adapter(a_core(basis, 8), user="bob"),  # noqa: B023
            lambda: again.put_basis(basis),  # noqa: B023
        ):
            with pytest.raises(RegistryError, match=f"basis {basis.id}: its stored copy is damaged"):
                ask()
        again.close()
    assert path.read_bytes() == b""


def test_a_basis_swapped_for_another_valid_one_is_refused(local: Registry, tmp_path: Path) -> None:
    one, other = (local.put_basis(a_basis(seed)) for seed in (1, 2))
    folder = tmp_path / "registry" / "bases"
    overwrite(folder / one, (folder / other).read_bytes())
    with pytest.raises(RegistryError, match=f"basis {one}: its stored copy is damaged: content {other}"):
        local.get_basis(one)


def test_a_damaged_core_is_refused_by_its_id_and_never_overwritten(local: Registry, tmp_path: Path) -> None:
    basis = a_basis()
    local.put_basis(basis)
    core = a_core(basis)
    local.put_adapter(core, user="ada")
    path = tmp_path / "registry" / "adapters" / core.id / "core.safetensors"
    broken = path.read_bytes()[:-4] + b"\1\2\3\4"
    overwrite(path, broken)
    for ask in (lambda: local.get_adapter(core.id), lambda: local.put_adapter(core, user="bob")):
        with pytest.raises(RegistryError, match=f"adapter {core.id}: its stored copy is damaged"):
            ask()
    assert path.read_bytes() == broken


def test_forgetting_takes_the_core_and_leaves_the_basis_and_the_others(registry: Registry) -> None:
    basis = a_basis()
    registry.put_basis(basis)
    mine, theirs = (registry.put_adapter(a_core(basis, seed), user=f"u{seed}") for seed in (1, 2))
    set_id = registry.freeze_current(MODEL)
    before = registry.identity()
    report = registry.forget("u1")
    assert (report.adapters_removed, report.sets_touched) == ((mine,), (set_id,))
    assert not registry._blobs.has(f"adapters/{mine}") and registry.identity() != before
    with pytest.raises(RegistryError, match="forgotten"):
        registry.get_adapter(mine)
    assert registry.get_adapter(theirs).pairs and registry.get_basis(basis.id).id == basis.id
    assert registry.put_adapter(a_core(basis, 1), user="u1") == mine  # who comes back
    assert registry.get_core(mine).id == mine


def test_what_cannot_be_a_basis_is_not_stored(local: Registry, tmp_path: Path) -> None:
    basis = a_basis()
    name = min(SHAPES)
    u, v = basis.sides[name]
    for wrong, said in (
        ({}, "no modules"),
        ({name: (u.double(), v)}, "float64"),
        ({name: (u[:, :0], v)}, "k >= 1"),
        ({name: (u, v.clone().fill_(float("inf")))}, "NaN or Inf"),
    ):
        with pytest.raises(AdapterError, match=said):
            local.put_basis(dataclasses.replace(basis, sides=wrong))
    assert not (tmp_path / "registry" / "bases").exists()


def test_numbers_changed_after_they_were_hashed_get_the_id_of_what_they_are_now(local: Registry) -> None:
    basis = a_basis()
    old = basis.id
    basis.sides[min(SHAPES)][0].add_(1)
    assert local.put_basis(basis) != old


def test_a_registry_from_before_there_were_bases_takes_cores(local: Registry, tmp_path: Path) -> None:
    held = local.put_adapter(pairs(), user="bob")
    with local._catalogue.write() as session:
        for table in ("soppu_cores", "soppu_basis_uses", "soppu_bases"):
            session.execute(sa.text(f"DROP TABLE {table}"))
        session.execute(sa.update(SchemaRow).values(version=2))
    local.close()
    again = Registry.open(tmp_path / "registry")
    assert again.current("bob") == held and again.current_basis(MODEL) == ""
    basis = a_basis()
    again.put_basis(basis)
    again.use_basis(basis.id)
    assert again.get_core(again.put_adapter(a_core(basis), user="ada")).basis_id == basis.id
    with again._catalogue.read() as session:
        assert session.scalar(sa.select(SchemaRow.version)) == SCHEMA_VERSION
