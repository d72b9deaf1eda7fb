"""The layer formula, row by row, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from soppu.adapter import LoraPair
from soppu.compress.numbers.components import Components, Side
from soppu.errors import UnsupportedModel
from soppu.models import linear_shapes
from soppu.serve.layers.adapted_linear import AdaptedLinear, Router, install
from soppu.serve.layers.deltas import Layers
from soppu.serve.layers.factors import BundleSlot, ModuleFactors, OwnNumbers, PairSlot, SharedFactors, Slot
from soppu.serve.layers.records import pack
from soppu.serve.layers.routing import Routing
from tests.soppu.serve.handmade import dense

I, O, N = 7, 5, 4  # noqa: E741
SHAPE = (O, I)
LAYER = Layers(("layer",), (O,))


def shared(g: torch.Generator, members: int, *, k_out: int, k_in: int, c: int | None) -> SharedFactors:
    P = torch.randn(members, k_out, k_in if c is None else c, generator=g)
    Q = None if c is None else torch.randn(members, c, k_in, generator=g)
    return SharedFactors(torch.randn(O, k_out, generator=g), torch.randn(I, k_in, generator=g), P, Q)


def factors(seed: int, *, own: tuple[int, ...] = (0,) * N, place: tuple[int, ...]) -> ModuleFactors:
    """Two clusters, thin cores in one and full ones in the other; `own` holds the ranks of own pairs."""
    g = torch.Generator().manual_seed(seed)
    clusters = {0: shared(g, 2, k_out=4, k_in=3, c=2), 1: shared(g, 2, k_out=2, k_in=3, c=None)}
    return ModuleFactors(clusters, torch.tensor(place), numbers(own, g) if any(own) else None)


def numbers(own: tuple[int, ...], g: torch.Generator) -> OwnNumbers:
    """Records of users with so many components each, without a basis."""
    sides = [Side.of_own(torch.randn(sum(own), d, generator=g), 32) for d in (O, I)]
    user = torch.tensor([user for user, rank in enumerate(own) for _ in range(rank)])
    part = Components(user, 5 * torch.ones(sum(own)), *sides)
    held = pack([part], users=len(own), cuts=[(range(O), range(I))], ranks=[(0, 0)])
    return OwnNumbers(held, 0, {})


def pair(seed: int, rank: int) -> LoraPair:
    g = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, I, generator=g), torch.randn(O, rank, generator=g))


def users(modules: dict[str, ModuleFactors]) -> list[Slot]:
    return [BundleSlot(modules, index, index // 2) for index in range(N)]


def layer(*, conv: bool = False) -> tuple[nn.Module, nn.Module, Router]:
    torch.manual_seed(0)
    base = Conv1D(O, I) if conv else nn.Linear(I, O)
    model = nn.ModuleDict({"layer": base})
    router = Router()
    install(model, ["layer"], router=router)
    return model["layer"], base, router


SHARED = users({"layer": factors(1, place=(0, 1, 0, 1))})
MIXED = users({"layer": factors(2, place=(1, -1, -1, 0), own=(0, 3, 1, 0))})
PARTLY = users({"layer": factors(3, place=(-1, 0, 0, -1))})
POOL: list[Slot | None] = [
    None,
    *SHARED,
    *MIXED,
    *PARTLY,
    *users({"other": factors(4, place=(0, 1, 0, 1))}),
    PairSlot({"layer": pair(5, 1)}),
    PairSlot({"layer": pair(6, 4)}),
    PairSlot({"other": pair(7, 2)}),
]
UNCHANGED = [slot for slot in POOL if not dense(slot, "layer", SHAPE).any()]


@pytest.mark.parametrize("conv", [False, True])
@settings(max_examples=60)
@given(rows=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=9), tokens=st.integers(1, 3))
def test_every_row_gets_its_own_change(conv: bool, rows: list[int], tokens: int) -> None:
    adapted, base, router = layer(conv=conv)
    slots = [POOL[row] for row in rows]
    x = torch.randn(len(rows), tokens, I)
    with torch.no_grad(), router.using(Routing(slots)):
        y = adapted(x)
    for row, slot in enumerate(slots):
        expected = base(x)[row].double() + x[row].double() @ dense(slot, "layer", SHAPE).T
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_without_an_adapter_are_the_base_layer_bit_for_bit() -> None:
    adapted, base, router = layer()
    assert len(UNCHANGED) == 1 + 2 + N + 1
    changed = [SHARED[1], SHARED[2], MIXED[1], PARTLY[1], POOL[-2]]
    slots = [slot for two in zip(UNCHANGED, changed, strict=False) for slot in two]
    x = torch.randn(len(slots), 4, I)
    with torch.no_grad():
        alone = base(x)
        with router.using(Routing(slots)):
            y = adapted(x)
    for row in range(0, len(slots), 2):
        assert torch.equal(y[row].view(torch.int32), alone[row].view(torch.int32))
        assert not torch.allclose(y[row + 1], alone[row + 1])


def test_nothing_happens_outside_a_routing_and_base_weights_never_change() -> None:
    adapted, base, router = layer()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x = torch.randn(2, 3, I)
    with router.using(Routing([SHARED[0], MIXED[2]])):
        adapted(x)
    assert router.routing is None
    assert torch.equal(adapted(x), base(x))
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_a_failed_forward_leaves_no_routing_behind() -> None:
    router = Router()
    with pytest.raises(RuntimeError), router.using(Routing([None])):
        raise RuntimeError
    assert router.routing is None


def test_factors_are_gathered_once_for_a_routing() -> None:
    routing = Routing([SHARED[0], SHARED[1], None])
    assert routing.changes(LAYER) is routing.changes(LAYER)
    assert routing.changes(Layers(("absent",), (O,))) == ()


def test_a_module_has_a_change_for_each_cluster_of_each_bundle_and_one_for_all_pairs() -> None:
    slots = [*SHARED, *SHARED, *MIXED, POOL[-2], POOL[-3], None]
    changes = Routing(slots).changes(LAYER)
    rows = [change.rows.tolist() for change in changes if change.rows is not None]
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7], [8], [11], [9, 10, 12, 13]]
    (whole,) = Routing(SHARED[:2]).changes(LAYER)
    assert whole.rows is None


def test_a_layer_that_mixes_rows_is_refused() -> None:
    adapted, _, router = layer()
    with (
        router.using(Routing([SHARED[0]] * 2)),
        pytest.raises(UnsupportedModel, match="layer: input"),
    ):
        adapted(torch.randn(6, I))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_flat_layer_gives_every_row_its_own_change(tokens: int) -> None:
    torch.manual_seed(0)
    base, router = nn.Linear(I, O), Router()
    flat = AdaptedLinear(base, name="layer", router=router, flat=True)
    plain = AdaptedLinear(base, name="layer", router=router)
    x = torch.randn(len(POOL), tokens, I)
    with torch.no_grad(), router.using(Routing(POOL)):
        torch.testing.assert_close(flat(x.view(-1, I)), plain(x).view(-1, O))
    assert flat(x.view(-1, I)).shape == (len(x) * tokens, O)


def test_installing_twice_wraps_once_and_shapes_are_those_of_the_change() -> None:
    model = nn.ModuleDict({"a": nn.Linear(I, O), "b": Conv1D(O, I), "c": nn.LayerNorm(I)})
    assert linear_shapes(model) == {"a": (O, I), "b": (O, I)}
    router = Router()
    install(model, ["a"], router=router)
    wrapped = model["a"]
    install(model, ["a", "b"], router=router)
    assert model["a"] is wrapped and isinstance(model["b"], AdaptedLinear)
    assert wrapped.weight is wrapped.base.weight and wrapped.bias is wrapped.base.bias


def test_own_pairs_and_plain_adapters_that_fill_a_batch_keep_to_their_rows() -> None:
    adapted, base, router = layer()
    slots = [MIXED[1], PairSlot({"layer": pair(6, 4)})]  # a bundle's own pair before a plain adapter
    x = torch.randn(2, 1, I)
    with torch.no_grad(), router.using(Routing(slots)):
        y = adapted(x)
    for row, slot in enumerate(slots):
        expected = base(x)[row].double() + x[row].double() @ dense(slot, "layer", SHAPE).T
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=1e-4)
