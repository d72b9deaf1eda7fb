"""A core as a row of a bundle: exact, nobody else touched, and served as an ordinary user is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress, forget
from soppu.compress.bundle import container
from soppu.compress.joining import basis_of, join
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.errors import AdapterError, BundleError, ConfigError

SHAPES = {"model.layers.2.self_attn.q_proj": (24, 20), "model.layers.3.mlp.down_proj": (20, 28)}


def fleet(users: int = 4, *, rank: int = 3) -> dict[str, LoraAdapter]:
    """Adapters that lie in four directions on either side."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    spans = {name: (some(o, 4), some(4, i)) for name, (o, i) in SHAPES.items()}
    return {
        f"u{n}": LoraAdapter(
            {name: LoraPair(some(rank, 4) @ v, u @ some(4, rank)) for name, (u, v) in spans.items()},
            "tiny",
            "b" * 64,
        )
        for n in range(users)
    }


@pytest.fixture(scope="module", params=["joint", "residual"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    if request.param == "joint":
        return compress(fleet(), CompressOptions(method="joint", rank=6, core_bits=8))
    return compress(fleet(8), CompressOptions(method="residual", max_error=0.2))


def placed(basis: CoreBasis, *, own: int = 0) -> CoreInBasis:
    draw = torch.Generator().manual_seed(3)
    made = {name: torch.randn(shape, generator=draw) for name, shape in basis.core_shapes().items()}
    beside = {
        name: LoraPair(torch.randn(own, i, generator=draw), torch.randn(o, own, generator=draw))
        for name, (o, i) in (basis.module_shapes().items() if own else ())
    }
    return CoreInBasis(dataclasses.replace(cores.zero(basis), cores=made, own=beside), basis)


def dense(adapter: LoraAdapter) -> torch.Tensor:
    return torch.cat([adapter.pairs[name].delta().double().reshape(-1) for name in sorted(adapter.pairs)])


@pytest.mark.parametrize(("own", "bits", "most"), [(0, 32, 1e-6), (3, 32, 1e-6), (2, 16, 5e-4)])
def test_a_core_is_kept_as_it_is_and_everybody_elses_bytes_too(
    bundle: Bundle, tmp_path: Path, own: int, bits: int, most: float
) -> None:
    user = placed(basis_of(bundle), own=own)
    joined = join(bundle, "new", user, bits=bits)
    joined.bundle.save(tmp_path / "bundle")
    back = Bundle.load(tmp_path / "bundle")
    wanted, found = dense(user.to_lora()), dense(back.reconstruct("new"))
    assert float((found - wanted).norm() / wanted.norm()) < most
    assert joined.error < most and joined.added == len(back.pages[-1].data)
    numbers = user.core.parameters() * bits // 8
    assert numbers < joined.added < 1.2 * numbers + 400
    # bases and pages of the others are the same bytes, as written
    before, after = (container._tensors(one) for one in (bundle, joined.bundle))
    assert torch.equal(before["bases"], after["bases"])
    for number in range(len(bundle.pages)):
        assert torch.equal(before[f"page.{number}"], after[f"page.{number}"])
    for name in bundle.users:
        assert torch.equal(dense(back.reconstruct(name)), dense(bundle.reconstruct(name)))


def test_who_joined_can_be_forgotten_again(bundle: Bundle) -> None:
    again = forget(join(bundle, "new", placed(basis_of(bundle))).bundle, "new")
    assert [one.data for one in again.pages] == [one.data for one in bundle.pages]


def test_a_core_that_changes_nothing_is_one(bundle: Bundle) -> None:
    basis = basis_of(bundle)
    joined = join(bundle, "new", CoreInBasis(cores.zero(basis), basis))
    assert joined.error == 0 and not dense(joined.bundle.reconstruct("new")).any()


def test_what_does_not_belong_together_is_refused_by_name(bundle: Bundle) -> None:
    basis = basis_of(bundle)
    user = placed(basis)
    with pytest.raises(BundleError, match="user 'u1' is in the bundle already"):
        join(bundle, "u1", user)
    with pytest.raises(ConfigError, match="bits = 8, allowed: 16, 32"):
        join(bundle, "new", user, bits=8)
    name = next(iter(basis.sides))
    u, v = basis.sides[name]
    other = dataclasses.replace(basis, sides={**basis.sides, name: (2 * u, v)})
    with pytest.raises(
        AdapterError, match=f"new: the core is told in basis {other.id}, found basis {basis.id}"
    ):
        join(bundle, "new", placed(other))


def test_a_bundle_without_bases_has_no_room_for_cores() -> None:
    alone = compress(fleet(2), CompressOptions(method="ternary"))
    with pytest.raises(BundleError, match="no module with a basis on both sides"):
        basis_of(alone)
