"""The ternary form on the wire: what comes back is what was chosen, small, and nothing hostile gets in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.codec import golomb
from soppu.compress.numbers import ternary
from soppu.errors import AdapterError, ConfigError
from soppu.federation import wire, wire_ternary
from soppu.federation.wire_ternary import GAINS, SIGNS
from tests.soppu.compress import ternary_measures as measures

# in another order than that of names, and one module with fewer outputs than the rank
SHAPES = {"model.layers.7.down_proj": (3, 8), "model.layers.6.q_proj": (6, 5)}
RANK = 4
GAIN_COUNT = 3 + 4


def make(
    shapes: dict[str, tuple[int, int]] = SHAPES, *, rank: int = RANK, seed: int = 0, decay: float = 0.6
) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(rank)
    pairs = {
        name: LoraPair(
            torch.randn(rank, i, generator=generator) * scale[:, None],
            torch.randn(o, rank, generator=generator),
        )
        for name, (o, i) in shapes.items()
    }
    return LoraAdapter(pairs, "tiny", "b" * 64, fan_in_fan_out=True)


def receive(
    state: dict[str, Tensor], shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = RANK
) -> LoraAdapter:
    return wire_ternary.from_ternary(
        state,
        shapes,
        rank=rank,
        who="alice",
        base_model="tiny",
        base_hash="b" * 64,
        fan_in_fan_out=True,
    )


@settings(max_examples=40)
@given(
    seed=st.integers(0, 100),
    rank=st.integers(1, 5),
    density=st.floats(1e-6, 1.0),
    shapes=st.dictionaries(
        st.sampled_from([f"model.layers.{n}.{p}" for n in (2, 10) for p in ("q_proj", "mlp.down_proj")]),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        min_size=1,
    ),
)
def test_there_and_back_is_the_compressed_adapter_exactly(
    seed: int, rank: int, density: float, shapes: dict[str, tuple[int, int]]
) -> None:
    adapter = make(shapes, rank=rank, seed=seed)
    back = receive(wire_ternary.to_ternary(adapter, density=density), shapes, rank)
    wanted = measures.applied(adapter, ternary.fixed(adapter, density=density))
    assert back.content_hash() == wanted.content_hash()
    assert list(back.pairs) == list(shapes)
    assert (back.base_model, back.base_hash, back.fan_in_fan_out) == ("tiny", "b" * 64, True)


def test_the_server_may_list_the_modules_in_another_order() -> None:
    state = wire_ternary.to_ternary(make(), density=0.5)
    turned = receive(state, dict(reversed(SHAPES.items())))
    assert turned.content_hash() == receive(state).content_hash()


def test_an_adapter_without_a_change_comes_back_as_one() -> None:
    still = LoraAdapter({name: LoraPair(p.A, torch.zeros_like(p.B)) for name, p in make().pairs.items()})
    back = receive(wire_ternary.to_ternary(still, density=0.2))
    assert all(bool((pair.delta() == 0).all()) for pair in back.pairs.values())


def test_two_tensors_whatever_the_number_of_modules() -> None:
    state = wire_ternary.to_ternary(make(), density=0.3)
    assert {name: (t.dtype, t.ndim) for name, t in state.items()} == {
        SIGNS: (torch.uint8, 1),
        GAINS: (torch.float32, 1),
    }
    assert state[GAINS].shape == (GAIN_COUNT,)


def test_it_is_far_smaller_than_float32_and_than_one_stream() -> None:
    shapes = {f"model.layers.{n}.{leaf}": (64, 96) for n in range(4) for leaf in ("q", "v", "o", "down")}
    adapter = make(shapes, rank=8)

    def size(state: dict[str, Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in state.values())

    state = wire_ternary.to_ternary(adapter, density=0.2)
    assert size(wire.to_state(adapter)) > 20 * size(state)
    made = ternary.fixed(adapter, density=0.2)
    flat = torch.cat([side.reshape(-1) for part in made.values() for side in (part.B, part.A)])
    assert state[SIGNS].numel() < len(golomb.encode(flat.numpy()))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        wire_ternary.to_ternary(make(), density=density)


# ---- what must not get in


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: value})


def gains(value: float, count: int = GAIN_COUNT) -> Tensor:
    made = torch.ones(count)
    made[-1] = value
    return made


def cut(state: dict[str, Tensor]) -> None:
    state[SIGNS] = state[SIGNS][:-1]


def grown(state: dict[str, Tensor]) -> None:
    state[SIGNS] = torch.cat([state[SIGNS], torch.zeros(1, dtype=torch.uint8)])


def recounted(state: dict[str, Tensor]) -> None:
    state[SIGNS][4 * RANK] += 1  # of the values in the first stream


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop(SIGNS), f"a ternary adapter of {GAINS}; expected"),
        (lambda state: state.pop(GAINS), f"a ternary adapter of {SIGNS}; expected"),
        (lambda state: state.clear(), "a ternary adapter of nothing"),
        (put("emulator/x", torch.zeros(1)), "a ternary adapter of emulator/x, ternary"),
        (put(GAINS, gains(math.nan)), f"{GAINS}: holds NaN or Inf"),
        (put(GAINS, gains(-math.inf)), f"{GAINS}: holds NaN or Inf"),
        (put(GAINS, gains(1.0, 2 * RANK)), r"torch.float32 \(8,\), the plan says torch.float32 \(7,\)"),
        (put(GAINS, gains(1.0)[:, None]), r"torch.float32 \(7, 1\), the plan says"),
        (
            put(GAINS, torch.full((GAIN_COUNT,), 1e300, dtype=torch.float64)),
            r"torch.float64 \(7,\), the plan says torch.float32",
        ),
        (put(SIGNS, torch.zeros(9)), r"torch.float32 \(9,\), expected torch.uint8 of one dimension"),
        (put(SIGNS, torch.zeros(3, 3, dtype=torch.uint8)), r"torch.uint8 \(3, 3\), expected"),
        (put(SIGNS, torch.zeros((), dtype=torch.uint8)), r"torch.uint8 \(\), expected"),
        (put(SIGNS, torch.zeros(0, dtype=torch.uint8)), "0 bytes, the lengths of 4 streams take 16"),
        (put(SIGNS, torch.full((99,), 255, dtype=torch.uint8)), f"{SIGNS}: streams of"),
        (put(SIGNS, torch.zeros(16, dtype=torch.uint8)), f"{SIGNS}: stream 0: "),
        (cut, "streams of"),
        (grown, "streams of"),
        (recounted, r"stream 0: 23 ternary numbers, expected 22"),
    ],
)
def test_what_a_sender_can_get_wrong_is_named(
    change: Callable[[dict[str, Tensor]], object], fault: str
) -> None:
    state = wire_ternary.to_ternary(make(), density=0.5)
    receive(state)
    change(state)
    with pytest.raises(AdapterError, match=fault) as caught:
        receive(state)
    assert str(caught.value).startswith("alice: ")


@pytest.mark.parametrize(
    ("shapes", "rank"),
    [
        ({**SHAPES, "model.layers.6.q_proj": (5, 5)}, RANK),
        ({"model.layers.6.q_proj": (6, 5)}, RANK),
        (SHAPES, 2),
        (SHAPES, 6),
    ],
    ids=["another module", "a module less", "a smaller rank", "a larger rank"],
)
def test_another_plan_is_refused(shapes: dict[str, tuple[int, int]], rank: int) -> None:
    with pytest.raises(AdapterError, match="alice: "):
        receive(wire_ternary.to_ternary(make(), density=0.5), shapes, rank)


@settings(max_examples=150)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), junk=st.binary(max_size=60), whole=st.booleans())
def test_any_bytes_give_an_adapter_of_the_plan_or_an_error_by_name(
    at: int, value: int, junk: bytes, whole: bool
) -> None:
    state = wire_ternary.to_ternary(make(), density=0.5)
    if whole:
        state[SIGNS] = torch.tensor(list(junk), dtype=torch.uint8)
    else:
        state[SIGNS][at % state[SIGNS].numel()] = value
    try:
        back = receive(state)
    except AdapterError as error:
        assert str(error).startswith(f"alice: {SIGNS}: ")
    else:
        shapes = {name: (o, i) for name, (o, _, i) in back.shapes().items()}
        assert shapes == SHAPES
        assert all(bool(torch.isfinite(side).all()) for p in back.pairs.values() for side in (p.A, p.B))
