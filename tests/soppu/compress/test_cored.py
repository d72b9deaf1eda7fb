"""Users who are cores in one basis, as a bundle: kept bit for bit or rounded as asked, every error told."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress, compress_cores, forget
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.cored import run as cored
from soppu.compress.joining import basis_of, join
from soppu.compress.lorax_export import export
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.cores.projecting import carry, from_lora
from soppu.errors import AdapterError, BundleError

SHAPES = {"model.layers.2.self_attn.q_proj": (40, 32), "model.layers.3.mlp.down_proj": (32, 48)}
FLOAT32 = CompressOptions(method="joint", basis_bits=32, core_bits=32)
STORED = CompressOptions(method="joint", basis_bits=8, core_bits=8)


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_basis(k_out: int = 6, k_in: int = 6, *, seed: int = 0) -> CoreBasis:
    """Of columns of length 1, as those of a bundle are; they need not be orthogonal."""
    sides = {}
    for name, (o, i) in SHAPES.items():
        u, v = some(o, min(k_out, o), seed=seed), some(i, min(k_in, i), seed=seed + 1)
        sides[name] = (u / u.norm(dim=0), v / v.norm(dim=0))
    return CoreBasis(sides, "tiny", "b" * 64)


def a_core(basis: CoreBasis, seed: int, *, own: int = 0, scale: float = 1.0) -> CoreAdapter:
    made = {
        name: scale * some(*shape, seed=seed + place)
        for place, (name, shape) in enumerate(basis.core_shapes().items())
    }
    beside = {
        name: LoraPair(some(own, i, seed=seed + 7), some(o, own, seed=seed + 8))
        for name, (o, i) in (basis.module_shapes().items() if own else ())
    }
    return dataclasses.replace(cores.zero(basis), cores=made, own=beside)


def pairs(seed: int, rank: int = 3, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> LoraAdapter:
    made = {
        name: LoraPair(some(rank, i, seed=seed), some(o, rank, seed=seed + 1))
        for name, (o, i) in shapes.items()
    }
    return LoraAdapter(made, "tiny", "b" * 64)


def dense(adapter: LoraAdapter) -> Tensor:
    return torch.cat([adapter.pairs[name].delta().double().reshape(-1) for name in sorted(adapter.pairs)])


def apart(bundle: Bundle, user: str, wanted: LoraAdapter) -> float:
    """Relative distance of what is in the bundle, by dense matrices."""
    return float((dense(bundle.reconstruct(user)) - dense(wanted)).norm() / dense(wanted).norm())


def read_core(bundle: Bundle, user: str, name: str) -> Tensor:
    """The core as a server puts it together, in float32 like that."""
    shelf = Shelf.of(bundle)
    part = shelf.components(bundle.index(user))[list(bundle.shapes).index(name)]
    out, inn = (side.k for side in bundle.bases[name][0])
    return (part.left.coordinates(out) * part.gain[:, None]).mT @ part.right.coordinates(inn)


def again(bundle: Bundle) -> Bundle:
    """As a file gives it back, every page of it checked."""
    return Bundle.from_bytes(bundle.to_bytes())


@pytest.mark.parametrize("own", range(5))
@pytest.mark.parametrize(("k_out", "k_in"), [(6, 6), (4, 7), (7, 4), (99, 99), (1, 1)])
def test_in_float32_basis_and_cores_come_back_bit_for_bit(k_out: int, k_in: int, own: int) -> None:
    basis = a_basis(k_out, k_in)
    members = {
        "ada": a_core(basis, 1, scale=0.03),
        "bob": a_core(basis, 20, own=own, scale=700.0),
        "cy": cores.zero(basis),
    }
    bundle = again(compress_cores(members, basis, FLOAT32))
    assert basis_of(bundle).id == basis.id
    assert bundle.adapter_ids == tuple(core.id for core in members.values())
    for user, core in members.items():
        for name, wanted in core.cores.items():
            assert torch.equal(read_core(bundle, user, name), wanted)
        exact = CoreInBasis(core, basis).to_lora()
        if user != "cy":
            assert apart(bundle, user, exact) < 1e-6
        assert bundle.report.relative_error[user] < (1e-6 if core.own else 1e-30)
    assert bundle.report.method == "cores" and f"basis {basis.id} float32" in bundle.report.storage
    assert bundle.report.parameters_before == sum(core.parameters() for core in members.values())


def test_a_set_of_one_and_sets_of_any_batch_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = a_basis(4, 5)
    members: dict[str, CoreAdapter | LoraAdapter] = {
        f"u{n}": a_core(basis, n, own=n % 3) if n % 4 else pairs(n) for n in range(9)
    }
    whole = compress_cores(members, basis, STORED).to_bytes()
    for most in (1, 2, 5):
        monkeypatch.setattr(cored, "_MOST_USERS", most)
        assert compress_cores(members, basis, STORED).to_bytes() == whole
    alone = again(compress_cores({"u1": members["u1"]}, basis, STORED))
    whole_ = Bundle.from_bytes(whole)
    assert torch.equal(dense(alone.reconstruct("u1")), dense(whole_.reconstruct("u1")))


class OneByOne(Mapping[str, CoreAdapter]):
    """Cores that are made when asked for; how often, and how many of them are alive at once."""

    def __init__(self, basis: CoreBasis, users: int) -> None:
        self.basis, self.users, self.asked, self.most = basis, users, 0, 0
        self._alive: weakref.WeakSet[CoreAdapter] = weakref.WeakSet()

    def __getitem__(self, user: str) -> CoreAdapter:
        made = a_core(self.basis, int(user))
        self._alive.add(made)
        self.asked, self.most = self.asked + 1, max(self.most, len(self._alive))
        return made

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self.users))

    def __len__(self) -> int:
        return self.users


def test_many_users_are_read_once_and_few_of_them_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cored, "_MOST_USERS", 8)
    members = OneByOne(a_basis(2, 2), 200)
    told: list[int] = []
    gc.collect()
    bundle = compress_cores(
        members, members.basis, FLOAT32, progress=lambda what, done, total: told.append(done)
    )
    assert members.asked == len(bundle.users) == told[-1] == 200
    assert members.most <= 2 * 8


@pytest.mark.parametrize(("bits", "most"), [(4, 0.3), (6, 0.06), (8, 0.02), (16, 1e-3)])
@pytest.mark.parametrize("own", [0, 2])
def test_rounding_is_asked_for_and_its_error_is_that_of_the_dense_difference(
    bits: int, most: float, own: int
) -> None:
    basis = a_basis(5, 7)
    members = {"ada": a_core(basis, 1, own=own), "bob": a_core(basis, 30)}
    options = dataclasses.replace(STORED, basis_bits=max(bits, 8), core_bits=bits)
    bundle = again(compress_cores(members, basis, options))
    for user, core in members.items():
        found = apart(bundle, user, CoreInBasis(core, basis).to_lora())
        assert found == pytest.approx(bundle.report.relative_error[user], rel=1e-3)
        assert 0 < found < most


def test_a_basis_that_came_from_integers_goes_back_into_them_and_loses_nothing() -> None:
    """So the bases of a bundle, its cores' bundle and so on are one, night after night."""
    fitted = compress({f"u{n}": pairs(n) for n in range(6)}, CompressOptions(method="joint", rank=5))
    basis = basis_of(fitted)
    assert basis.id == basis_of(again(fitted)).id
    made = again(compress_cores({"ada": a_core(basis, 1)}, basis, STORED))
    assert basis_of(made).id == basis.id
    assert [side.width for pair in made.bases.values() for side in pair[0]] == [8] * 4


def test_adapters_enter_as_their_projection_and_what_the_basis_misses_is_in_the_report() -> None:
    basis = a_basis(6, 6)
    inside = CoreInBasis(a_core(basis, 5), basis).to_lora()
    name, other = SHAPES
    odd = pairs(4, shapes={name: SHAPES[name], "model.layers.9.mlp.up_proj": (12, 12)})
    members = {"core": a_core(basis, 1), "spanned": inside, "free": pairs(2), "odd": odd}
    bundle = again(compress_cores(members, basis, FLOAT32))
    errors = bundle.report.relative_error
    assert errors["core"] == 0 and errors["spanned"] < 1e-6
    for user in ("free", "odd"):
        wanted = from_lora(members[user], basis)  # type: ignore[arg-type]
        assert errors[user] == pytest.approx(wanted.error, rel=1e-5) and 0.1 < errors[user] < 1
        told = CoreInBasis(wanted.core, basis).to_lora()
        for module in bundle.reconstruct(user).pairs:
            found = bundle.reconstruct(user).pairs[module].delta()
            torch.testing.assert_close(found, told.pairs[module].delta(), rtol=1e-4, atol=1e-5)
    assert list(bundle.reconstruct("odd").pairs) == [name]
    assert "odd" not in bundle.report.module_error[other]


def wider(basis: CoreBasis, *, more: int) -> CoreBasis:
    """Spans all that the basis does, in other directions, and `more` on either side."""
    sides = {}
    for place, (name, both) in enumerate(basis.sides.items()):
        made = []
        for number, side in enumerate(both):
            columns = torch.cat([side, some(len(side), more, seed=60 + number)], 1)
            turned = columns @ some(columns.shape[1], columns.shape[1], seed=70 + place + number)
            made.append(turned / turned.norm(dim=0))
        sides[name] = (made[0], made[1])
    return dataclasses.replace(basis, sides=sides)


@pytest.mark.parametrize("more", [0, 2])
def test_cores_of_an_older_basis_are_carried_over_exactly_where_the_new_one_spans_it(more: int) -> None:
    old = a_basis(4, 5)
    new = wider(old, more=more)
    members = {"ada": a_core(old, 1, own=1), "bob": a_core(new, 2), "cy": a_core(old, 3)}
    bundle = again(compress_cores(members, new, FLOAT32, older={old.id: old}.__getitem__))
    for user, core in members.items():
        exact = CoreInBasis(core, old if core.basis_id == old.id else new).to_lora()
        assert apart(bundle, user, exact) < 1e-4 and bundle.report.relative_error[user] < 1e-4
    assert bundle.report.relative_error["bob"] == 0


def test_what_a_new_basis_does_not_span_is_an_error_of_that_size() -> None:
    old, new = a_basis(4, 4), a_basis(6, 6, seed=40)
    core = a_core(old, 1)
    bundle = again(compress_cores({"ada": core}, new, FLOAT32, older={old.id: old}.__getitem__))
    placed = CoreInBasis(core, old)
    carried = CoreInBasis(carry(placed, new), new).to_lora()
    assert float((dense(bundle.reconstruct("ada")) - dense(carried)).norm()) < 1e-4
    found = apart(bundle, "ada", placed.to_lora())
    assert found == pytest.approx(bundle.report.relative_error["ada"], rel=1e-5) and 0.1 < found < 1


@pytest.mark.parametrize("options", [FLOAT32, STORED])
def test_another_gauge_of_the_basis_changes_nothing(options: CompressOptions) -> None:
    """Whatever the columns of a basis are, of any length and angle: the users' changes are the same."""
    basis = a_basis(5, 4)
    turn = {n: (some(5, 5, seed=n), some(4, 4, seed=n + 1)) for n in range(2)}
    sides = {name: (u @ turn[n][0], v @ turn[n][1]) for n, (name, (u, v)) in enumerate(basis.sides.items())}
    turned = dataclasses.replace(basis, sides=sides)
    members = {"ada": a_core(basis, 1, own=1), "bob": a_core(basis, 2)}
    told = {user: carry(CoreInBasis(core, basis), turned) for user, core in members.items()}
    bundle = again(compress_cores(told, turned, options))
    for user, core in members.items():
        exact = CoreInBasis(core, basis).to_lora()
        most = 1e-5 if options is FLOAT32 else 0.15
        assert apart(bundle, user, exact) < most
        if options is STORED:
            found = apart(bundle, user, CoreInBasis(told[user], turned).to_lora())
            assert found == pytest.approx(bundle.report.relative_error[user], rel=1e-3)


def test_two_bases_and_no_rule_are_refused_by_both_names() -> None:
    one, other = a_basis(), a_basis(seed=40)
    members = {"ada": a_core(one, 1), "bob": a_core(other, 2)}
    with pytest.raises(
        AdapterError, match=f"bob: the core is told in basis {other.id}, found basis {one.id}"
    ):
        compress_cores(members, one, FLOAT32)
    elsewhere = dataclasses.replace(other, base_hash="c" * 64)
    core = dataclasses.replace(members["bob"], basis_id=elsewhere.id, base_hash="")
    with pytest.raises(AdapterError, match=f"basis {elsewhere.id}: made for base model cccc"):
        compress_cores({"bob": core}, one, FLOAT32, older={elsewhere.id: elsewhere}.__getitem__)
    less = dataclasses.replace(other, sides=dict(list(other.sides.items())[:1]))
    cut = a_core(less, 2)
    with pytest.raises(AdapterError, match="differ in module model.layers.3.mlp.down_proj"):
        compress_cores({"bob": cut}, one, FLOAT32, older={less.id: less}.__getitem__)


def test_what_does_not_belong_into_the_basis_is_refused_by_user() -> None:
    basis = a_basis()
    name = min(SHAPES)
    free = pairs(1)
    core = a_core(basis, 1)
    nan = dataclasses.replace(core, cores={n: c * float("nan") for n, c in core.cores.items()})
    wrong: list[tuple[CoreAdapter | LoraAdapter, str]] = [
        (nan, "NaN"),
        (dataclasses.replace(free, base_hash="c" * 64), "made for base model"),
        (dataclasses.replace(free, fan_in_fan_out=True), "fan_in_fan_out is True"),
        (pairs(1, shapes={name: (9, 9)}), r"shape \(9, 9\)"),
        (pairs(1, shapes={"else": (9, 9)}), "changes no module that the basis has"),
        (a_core(basis, 1, scale=1e38), "norm"),
    ]
    for one, said in wrong:
        with pytest.raises(AdapterError, match=f"ada.*{said}"):
            compress_cores({"ada": one}, basis, FLOAT32)
    with pytest.raises(AdapterError, match="no adapters"):
        compress_cores({}, basis, FLOAT32)
    u, v = basis.sides[name]
    apart_ = torch.linalg.qr(torch.cat([u, some(len(u), 2, seed=5)], 1)).Q[:, -2:]
    outside = LoraAdapter({name: LoraPair(some(2, len(v), seed=6), apart_)}, "tiny", "b" * 64)
    with pytest.raises(BundleError, match="nothing of ada and 0 more would be left"):
        compress_cores({"ada": outside}, basis, FLOAT32)


@pytest.mark.parametrize(("k_out", "k_in"), [(5, 7), (7, 5)])
def test_it_is_exported_as_plain_peft_folders(tmp_path: Path, k_out: int, k_in: int) -> None:
    basis = a_basis(k_out, k_in)
    members = {"ada": a_core(basis, 1, own=2), "bob": a_core(basis, 20)}
    bundle = again(compress_cores(members, basis, FLOAT32))
    made = export(bundle, tmp_path / "out", dtype="float32", layers=4)
    for user, core in members.items():
        found, exact = adapters.read(made.folders[user]), CoreInBasis(core, basis).to_lora()
        for name, pair in exact.pairs.items():
            torch.testing.assert_close(found.pairs[name].delta(), pair.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [FLOAT32, STORED])
def test_one_in_the_middle_is_forgotten_and_somebody_joins(options: CompressOptions) -> None:
    basis = a_basis(5, 4)
    members = {f"u{n}": a_core(basis, 10 * n, own=n % 3) for n in range(5)}
    bundle = again(compress_cores(members, basis, options))
    less = again(forget(bundle, "u2"))
    assert less.users == ("u0", "u1", "u3", "u4") and less.basis_saw == (members["u2"].id,)
    for user in less.users:
        assert torch.equal(dense(less.reconstruct(user)), dense(bundle.reconstruct(user)))
    left = [core.parameters() for user, core in members.items() if user != "u2"]
    assert less.report.parameters_before == sum(left)
    here = basis_of(less)
    new = a_core(here, 99, own=2)
    more = again(join(less, "new", CoreInBasis(new, here)).bundle)
    assert more.report.parameters_before == sum(left) + new.parameters()
    assert basis_of(more).id == here.id
    for name, wanted in new.cores.items():
        assert torch.equal(read_core(more, "new", name), wanted)
