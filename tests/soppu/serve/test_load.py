"""From components to the tensors that are served: nothing lost, nothing twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soppu.compress.bundle import bundle as bundles
from soppu.compress.bundle.bundle import Bundle
from soppu.serve.bank import from_bundle
from soppu.serve.layers.factors import BundleSlot, ModuleFactors
from tests.soppu.compress import stored
from tests.soppu.serve import handmade
from tests.soppu.serve.handmade import KINDS, Sizes

SHAPES = {"first": (9, 7), "second": (6, 11), "third": (8, 8)}
MIXED = {
    "alice": [["shared", "shared"]],
    "bob": [["own", "own", "own"]],
    "carol": [["shared", "own"], ["shared"], ["left", "right"]],
    "dora": [["axis", "axis"], None, []],
    "emil": [[], ["both"], None],
    "fay": [["shared"] * 5, ["right"], ["axis"]],
}


def read(made: Bundle) -> dict[str, ModuleFactors]:
    return from_bundle.read(made, cast=lambda _, tensor: tensor)


def assert_served_as_meant(made: Bundle) -> None:
    modules = read(made)
    for index, user in enumerate(made.users):
        slot = BundleSlot(modules, index, int(made.cluster[index]))
        for name, shape in made.shapes.items():
            expected = handmade.meaning(made, user, name)
            torch.testing.assert_close(handmade.dense(slot, name, shape), expected, rtol=1e-5, atol=1e-5)


kinds = st.lists(st.sampled_from(sorted(KINDS)), max_size=4)
plans = st.lists(st.none() | kinds, min_size=3, max_size=3).filter(lambda plan: plan != [None] * 3)


@settings(max_examples=60)
@given(
    users=st.lists(plans, min_size=1, max_size=5),
    clusters=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    page=st.integers(1, 5),
)
def test_any_components_are_served_as_meant(
    users: list[handmade.Plan], clusters: list[int], page: int
) -> None:
    named = {f"user{n}": plan for n, plan in enumerate(users)}
    sizes = Sizes(k_out=4, k_in=5, page=page)
    assert_served_as_meant(
        handmade.bundle(SHAPES, named, clusters=clusters[: len(users)], sizes=sizes, seed=page)
    )


def test_only_a_user_with_numbers_of_their_own_at_a_module_has_a_pair_there() -> None:
    made = handmade.bundle(SHAPES, MIXED, clusters=[0, 1, 1, 0, 1, 0])
    modules = read(made)
    for index, (user, plan) in enumerate(MIXED.items()):
        for module, name in enumerate(SHAPES):
            kinds, factors = plan[module % len(plan)] or [], modules[name]
            own = any("own" in KINDS[kind] or "both" in KINDS[kind] for kind in kinds)
            assert factors.own is not None
            pair = factors.own.pair(index, int(made.cluster[index]))
            assert (pair is not None) == own, (user, name)
            assert (int(factors.place[index]) >= 0) == (bool(kinds) and not own), (user, name)
            if pair is not None:
                exact = made.reconstruct(user).pairs[name]
                assert pair.rank == exact.rank
                torch.testing.assert_close(pair.delta(), exact.delta(), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(pair.A.norm(dim=1), pair.B.norm(dim=0))


def test_bases_are_held_once_for_a_module_and_cluster_and_pages_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = handmade.bundle(SHAPES, MIXED, clusters=[0, 1, 1, 0, 1, 0])
    read_pages: list[bytes] = []
    decode = bundles.page.decode

    def counted(data: bytes, *rest: object, **options: object) -> object:
        read_pages.append(data)
        return decode(data, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bundles.page, "decode", counted)
    monkeypatch.setattr(Bundle, "reconstruct", None)
    cast: list[tuple[str, Tensor]] = []
    from_bundle.read(made, cast=lambda name, tensor: (cast.append((name, tensor)), tensor)[1])
    assert read_pages == [page.data for page in made.pages] and len(read_pages) == 3
    for name in SHAPES:
        for cluster in (0, 1):
            for basis in made.matrices(name, cluster):
                assert basis is not None
                times = sum(n == name and torch.equal(t, basis) for n, t in cast if t.shape == basis.shape)
                assert times == 1


def test_a_basis_that_nobody_refers_to_is_not_held() -> None:
    one_sided = {"alice": [["own"], ["left"], ["right"]], "bob": [["own", "own"], ["own"], ["own"]]}
    modules = read(handmade.bundle(SHAPES, one_sided))
    held = [factors.own.bases.get(0, (None, None)) for factors in modules.values() if factors.own]
    assert [(U is None, V is None) for U, V in held] == [(True, True), (False, True), (True, False)]


def test_few_components_in_a_wide_basis_become_records_where_asked_for() -> None:
    users = {"alice": [["shared"]], "bob": [["shared"] * 20]}
    made = handmade.bundle({"only": (30, 40)}, users, sizes=Sizes(k_out=16, k_in=16))
    (factors,) = from_bundle.read(
        made, cast=lambda _, tensor: tensor, how=from_bundle.Reading(thin=True)
    ).values()
    assert factors.own is not None and factors.own.pair(0) is not None and factors.own.pair(1) is None
    assert factors.place.tolist() == [-1, 0] and read(made)["only"].own is None
    for index, user in enumerate(made.users):
        found = handmade.dense(BundleSlot({"only": factors}, index), "only", (30, 40))
        torch.testing.assert_close(found, handmade.meaning(made, user, "only"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("components", "k_out", "k_in", "full"),
    [(1, 4, 4, False), (2, 4, 4, False), (3, 4, 4, True), (3, 4, 8, True), (2, 4, 8, False), (2, 1, 8, True)],
)
def test_cores_are_full_where_that_is_cheaper(components: int, k_out: int, k_in: int, full: bool) -> None:
    users = {"alice": [["shared"] * components], "bob": [["shared"]]}
    made = handmade.bundle({"only": (9, 10)}, users, sizes=Sizes(k_out, k_in, page=1))
    factors = read(made)["only"].shared[0]
    assert factors.U.shape == (9, k_out) and factors.V.shape == (10, k_in)
    if full:
        assert factors.Q is None and factors.P.shape == (2, k_out, k_in)
    else:
        assert factors.Q is not None and factors.Q.shape == (2, components, k_in)
        assert factors.P.shape == (2, k_out, components)
    assert_served_as_meant(made)


def test_a_user_of_norm_zero_and_modules_without_components_hold_nothing() -> None:
    users = {
        "alice": [["own"], ["shared"], []],
        "bob": [["shared"], None, []],
        "carol": [["own"], ["own"], []],
    }
    made = handmade.bundle(SHAPES, users)
    zero = replace(made, norm=made.norm * torch.tensor([0.0, 1.0, 0.0]))
    modules = read(zero)
    assert list(modules) == ["first"]
    assert modules["first"].own is None and modules["first"].place.tolist() == [-1, 0, -1]
    assert_served_as_meant(zero)


def test_who_changes_nothing_is_known() -> None:
    users = {
        "alice": [["own"]],
        "bob": [[], [], ["shared"]],
        "carol": [[]],
        "dora": [["shared", "both"]],
        "emil": [["axis"]],
        "fay": [["left"]],
    }
    made = handmade.bundle(SHAPES, users, clusters=[0, 1, 0, 1, 0, 1])
    assert from_bundle.unchanged(made) == {"carol"}
    some = replace(made, norm=made.norm * torch.tensor([1.0, 1, 1, 0, 0, 1]))
    assert from_bundle.unchanged(some) == {"carol", "dora", "emil"}


def test_a_component_of_zero_numbers_changes_nothing() -> None:
    made = handmade.bundle(
        {"only": (5, 4)}, {"alice": [["own"]], "bob": [["shared"]]}, sizes=Sizes(page=2, k_in=3, k_out=3)
    )
    (part,) = made.components(0)
    part.left.own.zero_()
    assert from_bundle.unchanged(made) == {"alice"}
    part.right.coords.zero_()
    assert from_bundle.unchanged(made) == {"alice", "bob"}


@pytest.mark.parametrize(
    ("kind", "name", "places"),
    [("joint", "layers.0.v", [0, -1, 1]), ("joint, thin, float32", "layers.0.q", [0, 1, 2])],
)
def test_a_stored_joint_bundle_is_served_in_its_bases(kind: str, name: str, places: list[int]) -> None:
    made = stored.bundle(kind)
    factors = read(made)[name]
    assert (factors.own is None, factors.shared[0].Q is None) == (True, "thin" not in kind)
    assert factors.place.tolist() == places
    for index, user in enumerate(made.users):
        pair = made.reconstruct(user).pairs.get(name)
        expected = torch.zeros(made.shapes[name]) if pair is None else pair.delta()
        found = handmade.dense(BundleSlot({name: factors}, index), name, made.shapes[name])
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
