"""The layer formula, row by row, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soppu.adapter import LoraPair
from soppu.errors import UnsupportedModel
from soppu.serve.layers import (
    AdaptedLinear,
    PairSlot,
    Router,
    Routing,
    SharedFactors,
    SharedSlot,
    Slot,
    install,
    linear_shapes,
)

I, O, K, C, N = 7, 5, 4, 2, 3  # noqa: E741


def factors(seed: int, *, full: bool = False, present: tuple[bool, ...] = (True,) * N) -> SharedFactors:
    g = torch.Generator().manual_seed(seed)
    P = torch.randn(N, K, K if full else C, generator=g)
    Q = None if full else torch.randn(N, C, K, generator=g)
    return SharedFactors(torch.randn(O, K, generator=g), torch.randn(I, K, generator=g), P, Q, present)


def pair(seed: int, rank: int) -> LoraPair:
    g = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, I, generator=g), torch.randn(O, rank, generator=g))


def dense(slot: Slot | None) -> Tensor:
    """The change (o, i) that a slot stands for, in float64."""
    if slot is None:
        return torch.zeros(O, I).double()
    if isinstance(slot, PairSlot):
        return (
            (slot.pairs["layer"].B.double() @ slot.pairs["layer"].A.double())
            if slot.pairs
            else torch.zeros(O, I)
        )
    f = slot.modules["layer"]
    core = f.P[slot.index].double()
    core = core if f.Q is None else core @ f.Q[slot.index].double()
    return f.U.double() @ core @ f.V.double().T * f.present[slot.index]


def layer(*, conv: bool = False) -> tuple[nn.Module, nn.Module, Router]:
    torch.manual_seed(0)
    base = Conv1D(O, I) if conv else nn.Linear(I, O)
    model = nn.ModuleDict({"layer": base})
    router = Router()
    install(model, ["layer"], router=router)
    return model["layer"], base, router


THIN = {"layer": factors(1)}
FULL = {"layer": factors(2, full=True)}
PARTLY = {"layer": factors(3, present=(False, True, False))}
POOL: list[Slot | None] = [
    None,
    *(SharedSlot(THIN, index) for index in range(N)),
    *(SharedSlot(FULL, index) for index in range(N)),
    *(SharedSlot(PARTLY, index) for index in range(N)),
    PairSlot({"layer": pair(5, 1)}),
    PairSlot({"layer": pair(6, 4)}),
    PairSlot({"other": pair(7, 2)}),
]


@pytest.mark.parametrize("conv", [False, True])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, len(POOL) - 2), min_size=1, max_size=6), tokens=st.integers(1, 3))
def test_every_row_gets_its_own_change(conv: bool, rows: list[int], tokens: int) -> None:
    adapted, base, router = layer(conv=conv)
    slots = [POOL[row] for row in rows]
    x = torch.randn(len(rows), tokens, I)
    with torch.no_grad(), router.using(Routing(slots)):
        y = adapted(x)
    for row, slot in enumerate(slots):
        expected = base(x)[row].double() + x[row].double() @ dense(slot).T
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_without_an_adapter_are_the_base_layer_bit_for_bit() -> None:
    adapted, base, router = layer()
    absent = SharedSlot(PARTLY, 0)
    elsewhere = PairSlot({"other": pair(7, 2)})
    slots = [None, SharedSlot(THIN, 1), absent, POOL[-2], elsewhere]
    x = torch.randn(5, 4, I)
    with torch.no_grad():
        alone = base(x)
        with router.using(Routing(slots)):
            y = adapted(x)
    for row in (0, 2, 4):
        assert torch.equal(y[row].view(torch.int32), alone[row].view(torch.int32))
    for row in (1, 3):
        assert not torch.allclose(y[row], alone[row])


def test_nothing_happens_outside_a_routing_and_base_weights_never_change() -> None:
    adapted, base, router = layer()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x = torch.randn(2, 3, I)
    with router.using(Routing([SharedSlot(THIN, 0), SharedSlot(FULL, 2)])):
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
    routing = Routing([SharedSlot(THIN, 0), SharedSlot(THIN, 2), None])
    assert routing.changes("layer") is routing.changes("layer")
    assert routing.changes("absent") == ()


def test_a_layer_that_mixes_rows_is_refused() -> None:
    adapted, _, router = layer()
    with (
        router.using(Routing([SharedSlot(THIN, 0)] * 2)),
        pytest.raises(UnsupportedModel, match="layer: input"),
    ):
        adapted(torch.randn(6, I))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_flat_layer_gives_every_row_its_own_change(tokens: int) -> None:
    torch.manual_seed(0)
    base, router = nn.Linear(I, O), Router()
    flat = AdaptedLinear(base, name="layer", router=router, flat=True)
    plain = AdaptedLinear(base, name="layer", router=router)
    x = torch.randn(len(POOL[:-1]), tokens, I)
    with torch.no_grad(), router.using(Routing(POOL[:-1])):
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
