"""What travels: nothing is lost on the way, and nothing malformed arrives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError
from soppu.federation import wire

SHAPES = {"model.layers.6.q_proj": (6, 5), "model.layers.7.down_proj": (3, 8)}
KEY = "model.layers.7.down_proj.lora_A.weight"


def make(shapes: dict[str, tuple[int, int]] = SHAPES, *, rank: int = 2, seed: int = 0) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
        for name, (o, i) in shapes.items()
    }
    return LoraAdapter(pairs, "tiny", "b" * 64, fan_in_fan_out=True)


def receive(state: dict[str, Tensor]) -> LoraAdapter:
    return wire.from_state(state, SHAPES, rank=2, who="alice", base_model="tiny", base_hash="b" * 64)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 100),
    rank=st.integers(1, 5),
    shapes=st.dictionaries(
        st.sampled_from([f"model.layers.{n}.{p}" for n in range(3) for p in ("q_proj", "mlp.down_proj")]),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        min_size=1,
    ),
)
def test_there_and_back_is_exact(seed: int, rank: int, shapes: dict[str, tuple[int, int]]) -> None:
    adapter = make(shapes, rank=rank, seed=seed)
    both = {**wire.to_state(adapter), **wire.to_state(make(rank=3), prefix=wire.EMULATOR)}
    users, emulator = wire.split_state(both)
    back = wire.from_state(
        users, shapes, rank=rank, who="x", base_model="tiny", base_hash="b" * 64, fan_in_fan_out=True
    )
    assert back.content_hash() == adapter.content_hash()
    assert (back.base_model, back.fan_in_fan_out) == ("tiny", True)
    loose = wire.loose_from_state(emulator, base_hash="b" * 64)
    assert loose.pairs.keys() == SHAPES.keys() and loose.base_hash == "b" * 64
    for name, pair in make(rank=3).pairs.items():
        assert torch.equal(loose.pairs[name].A, pair.A) and torch.equal(loose.pairs[name].B, pair.B)


def test_everything_on_the_wire_is_float32_and_full_model_named() -> None:
    halves = {name: LoraPair(p.A.bfloat16().requires_grad_(), p.B.half()) for name, p in make().pairs.items()}
    state = wire.to_state(LoraAdapter(halves))
    assert sorted(state) == sorted(f"{name}.lora_{side}.weight" for name in SHAPES for side in "AB")
    assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in state.values())


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop(KEY), rf"alice: tensor {KEY} is missing \(1 in all\)"),
        (lambda state: state.clear(), r"is missing \(4 in all\)"),
        (
            put("model.layers.5.q_proj.lora_A.weight", torch.zeros(2, 5)),
            r"layers\.5.* is not part of the plan",
        ),
        (put("emulator/" + KEY, torch.zeros(2, 8)), r"emulator/.* is not part of the plan \(1 in all\)"),
        (put(KEY, torch.zeros(3, 8)), rf"{KEY}: shape \(3, 8\), the plan says \(2, 8\)"),
        (put(KEY, torch.zeros(8, 2)), r"shape \(8, 2\), the plan says \(2, 8\)"),
        (put(KEY, torch.zeros(16)), r"shape \(16,\), the plan says \(2, 8\)"),
        (put(KEY, torch.full((2, 8), math.nan)), rf"{KEY}: holds NaN or Inf"),
        (put(KEY, torch.tensor([[0.0] * 8, [0.0] * 7 + [math.inf]])), "holds NaN or Inf"),
        (put(KEY, torch.full((2, 8), 1e300, dtype=torch.float64)), "holds NaN or Inf"),  # as float32
        (put(KEY, torch.zeros(2, 8, dtype=torch.int64)), "holds torch.int64, expected floating-point"),
        (put(KEY, torch.zeros(2, 8, dtype=torch.complex64)), "holds torch.complex64, expected"),
    ],
)
def test_what_a_sender_can_get_wrong_is_named(
    change: Callable[[dict[str, Tensor]], object], fault: str
) -> None:
    state = wire.to_state(make())
    receive(state)
    change(state)
    with pytest.raises(AdapterError, match=fault) as caught:
        receive(state)
    assert str(caught.value).startswith("alice: ")
