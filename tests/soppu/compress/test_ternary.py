"""ComPEFT repaired: what is kept, how near it comes, and what it does better than the released form."""

from __future__ import annotations

import math

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.numbers import ternary
from soppu.compress.numbers.ternary import Ternary
from soppu.errors import AdapterError, ConfigError
from tests.soppu.compress import ternary_measures as measures
from tests.soppu.compress.ternary_adapters import SHAPES, dense, draw, flat, gaussian


def briefly_trained(rank: int = 4) -> LoraAdapter:
    """LoRA as PEFT starts it, B = 0 and A uniform, after 30 steps of Adam: A is much larger than B."""
    pairs = {}
    for index, (name, (o, i)) in enumerate(SHAPES.items()):
        torch.manual_seed(index)
        A = torch.nn.init.kaiming_uniform_(torch.empty(rank, i), a=math.sqrt(5)).requires_grad_()
        B = torch.zeros(o, rank, requires_grad=True)
        target, x = draw(o, i, seed=index + 9), draw(200, i, seed=index + 5)
        adam = torch.optim.Adam([A, B], lr=1e-3)
        for _ in range(30):
            adam.zero_grad()
            (x @ (target - B @ A).mT).square().mean().backward()
            adam.step()
        pairs[name] = LoraPair(A=A.detach(), B=B.detach())
    return LoraAdapter(pairs)


def error(adapter: LoraAdapter, made: dict[str, Ternary]) -> float:
    """The relative error, by dense matrices."""
    near = dense(made)
    pairs = {name: LoraPair(pair.A.double(), pair.B.double()).delta() for name, pair in adapter.pairs.items()}
    square = sum(float((pairs[name] - near[name]).square().sum()) for name in pairs)
    return math.sqrt(square / sum(float(delta.square().sum()) for delta in pairs.values()))


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_faithful_erases_a_briefly_trained_adapter_and_fixed_does_not(density: float) -> None:
    adapter = briefly_trained()
    erased = ternary.faithful(adapter, density=density, alpha=1.0)
    assert not any(part.B.any() for part in erased.values())
    assert any(part.A.any() for part in erased.values())
    assert error(adapter, erased) == 1.0
    made = ternary.fixed(adapter, density=density)
    assert any(part.B.any() for part in made.values())
    assert error(adapter, made) < {0.05: 0.85, 0.2: 0.7}[density]


def test_fixed_does_not_depend_on_how_the_delta_is_split() -> None:
    adapter = gaussian()
    adapter = LoraAdapter({n: LoraPair(A=p.A.double(), B=p.B.double()) for n, p in adapter.pairs.items()})
    gauge = draw(3, 3, seed=77).double() + 2 * torch.eye(3)
    other = LoraAdapter(
        {n: LoraPair(A=torch.linalg.solve(gauge, p.A), B=p.B @ gauge) for n, p in adapter.pairs.items()}
    )
    first, second = ternary.fixed(adapter, density=0.3), ternary.fixed(other, density=0.3)
    for name, part in first.items():
        assert torch.equal(part.A, second[name].A) and torch.equal(part.B, second[name].B)
        torch.testing.assert_close(part.gain, second[name].gain)


def test_fixed_goes_with_the_scale_of_the_adapter() -> None:
    adapter = gaussian()
    small = LoraAdapter({n: LoraPair(A=1e-4 * p.A, B=1e-4 * p.B) for n, p in adapter.pairs.items()})
    first, second = ternary.fixed(adapter, density=0.3), ternary.fixed(small, density=0.3)
    for name, delta in dense(first).items():
        torch.testing.assert_close(1e8 * dense(second)[name], delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
def test_fixed_keeps_the_share_asked_for(density: float) -> None:
    made = ternary.fixed(gaussian(rank=5), density=density)
    total = flat(made).size
    assert measures.kept(made) == pytest.approx(density, abs=8 / total)


def test_more_density_never_hurts_and_ends_near_half() -> None:
    adapter = gaussian(rank=5)
    made = [ternary.fixed(adapter, density=d) for d in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
    errors = [error(adapter, part) for part in made]
    assert all(later <= earlier + 0.01 for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert 0.4 < measures.kept(made[-1]) < 0.7


def test_gains_are_the_best_there_are() -> None:
    adapter = gaussian()
    made = ternary.fixed(adapter, density=0.2)
    least = error(adapter, made)
    assert least < 1
    for name, part in made.items():
        for j in range(len(part.gain)):
            for factor in (0.98, 1.02):
                gain = part.gain.clone()
                gain[j] *= factor
                assert error(adapter, {**made, name: Ternary(part.B, part.A, gain)}) >= least


def test_signs_that_are_orthogonal_come_back_exactly() -> None:
    B = torch.tensor([[1.0, 1], [1, -1], [1, 1], [1, -1]])
    A = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]) * torch.tensor([[3.0], [0.5]])
    adapter = LoraAdapter({"m": LoraPair(A=A, B=B)})
    made = ternary.fixed(adapter, density=1.0)
    assert measures.kept(made) == 1.0
    torch.testing.assert_close(dense(made)["m"].float(), B @ A)


def test_full_density_beats_full_signs() -> None:
    """Signs of everything keep 2 / pi of the energy of a normal vector, the best threshold 0.81."""
    adapter = LoraAdapter({"m": LoraPair(A=draw(1, 4000), B=draw(4000, 1, seed=1))})
    made = ternary.fixed(adapter, density=1.0)
    assert measures.relative_error(adapter, made) == pytest.approx(math.sqrt(1 - 0.81**2), abs=0.02)
    assert measures.kept(made) == pytest.approx(0.54, abs=0.03)


def test_energy_decides_where_the_signs_go() -> None:
    strong, weak = (
        LoraPair(draw(1, 50), draw(50, 1, seed=1)),
        LoraPair(draw(1, 50, seed=2), 1e-3 * draw(50, 1, seed=3)),
    )
    made = ternary.fixed(LoraAdapter({"strong": strong, "weak": weak}), density=0.2)
    assert not made["weak"].A.any() and not made["weak"].B.any()
    assert made["strong"].A.count_nonzero() + made["strong"].B.count_nonzero() == 40


@pytest.mark.parametrize("mode", ["faithful", "fixed"])
def test_an_adapter_that_changes_nothing_stays_so(mode: str) -> None:
    adapter = gaussian(b=0.0)
    made = (
        ternary.fixed(adapter, density=0.3)
        if mode == "fixed"
        else ternary.faithful(adapter, density=0.3, alpha=1.0)
    )
    assert all(not delta.any() for delta in dense(made).values())
    assert measures.relative_error(adapter, made) == 0


def test_deltas_of_lower_rank_than_their_factors() -> None:
    B, A = draw(20, 1), draw(1, 16, seed=1)
    adapter = LoraAdapter(
        {"m": LoraPair(A=A.repeat(3, 1), B=B.repeat(1, 3)), "n": LoraPair(draw(6, 4), draw(3, 6))}
    )
    made = ternary.fixed(adapter, density=0.5)
    assert not made["m"].B[:, 1:].any() and not made["m"].gain[1:].any()
    assert made["n"].B.shape == (3, 3) and made["n"].A.shape == (3, 4)
    assert error(adapter, made) < 0.75


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_exactly_and_come_back_as_float32(dtype: torch.dtype) -> None:
    rounded = LoraAdapter({n: LoraPair(p.A.to(dtype), p.B.to(dtype)) for n, p in gaussian().pairs.items()})
    same = LoraAdapter({n: LoraPair(p.A.float(), p.B.float()) for n, p in rounded.pairs.items()})
    for method in (
        lambda adapter: ternary.faithful(adapter, density=0.3, alpha=1.0),
        lambda adapter: ternary.fixed(adapter, density=0.3),
    ):
        for name, part in method(rounded).items():
            other = method(same)[name]
            assert torch.equal(part.A, other.A) and torch.equal(part.B, other.B)
            torch.testing.assert_close(part.gain, other.gain)
            assert (part.A.dtype, part.B.dtype, part.gain.dtype) == (torch.int8, torch.int8, torch.float32)
            assert part.pair().A.dtype == part.pair().B.dtype == torch.float32


def test_a_pair_is_the_change_with_negative_and_zero_gains_too() -> None:
    part = Ternary(
        B=draw(5, 3).sign().to(torch.int8),
        A=draw(3, 4, seed=1).sign().to(torch.int8),
        gain=torch.tensor([2.0, -3, 0]),
    )
    torch.testing.assert_close(part.pair().delta(), part.B.float() * part.gain @ part.A.float())


@pytest.mark.parametrize("mode", ["faithful", "fixed"])
def test_the_relative_error_is_that_of_the_dense_matrices(mode: str) -> None:
    adapter = gaussian(b=3.0)
    made = (
        ternary.fixed(adapter, density=0.3)
        if mode == "fixed"
        else ternary.faithful(adapter, density=0.6, alpha=0.7)
    )
    assert measures.relative_error(adapter, made) == pytest.approx(error(adapter, made), rel=1e-6)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, 5, math.nan])
def test_fixed_refuses_other_densities(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        ternary.fixed(gaussian(), density=density)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_damaged_adapters_are_refused(damage: float) -> None:
    adapter = gaussian()
    adapter.pairs["model.layers.0.q"].A[0, 0] = damage
    for method in (
        lambda: ternary.faithful(adapter, density=0.3, alpha=1.0),
        lambda: ternary.fixed(adapter, density=0.3),
    ):
        with pytest.raises(AdapterError, match="NaN or Inf"):
            method()
