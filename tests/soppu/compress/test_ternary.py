"""ComPEFT: the released form against a slow plain reading of it, and what the repaired form does better."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.codec import golomb
from soppu.compress.numbers import ternary
from soppu.compress.numbers.ternary import Ternary
from soppu.errors import AdapterError, ConfigError
from tests.soppu.compress import ternary_measures as measures
from tests.soppu.compress.ternary_measures import Cell, SweepResult

PUBLISHED = {0.01: 0.0911, 0.02: 0.162, 0.05: 0.339, 0.1: 0.576, 0.2: 0.939, 0.3: 1.188, 0.5: 1.5}
SHAPES = {"model.layers.0.q": (20, 16), "model.layers.1.down": (12, 30), "model.layers.0.q2": (9, 11)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(rank: int = 3, *, b: float = 1.0, seed: int = 0) -> LoraAdapter:
    """An adapter of normal numbers, those of B times `b`."""
    pairs = {}
    for index, (name, (o, i)) in enumerate(SHAPES.items()):
        pairs[name] = LoraPair(
            A=draw(rank, i, seed=seed + 2 * index), B=b * draw(o, rank, seed=seed + 2 * index + 1)
        )
    return LoraAdapter(pairs, base_model="tiny", base_hash="b" * 64)


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


def released(adapter: LoraAdapter, *, k: float, alpha: float) -> dict[str, np.ndarray]:
    """The released procedure, number by number."""
    keys = {}
    for name, pair in adapter.pairs.items():
        keys[f"{name}.lora_A.weight"], keys[f"{name}.lora_B.weight"] = pair.A.numpy(), pair.B.numpy()
    tau = [float(x) for key in sorted(keys) for x in keys[key].reshape(-1)]
    mean = math.fsum(tau) / len(tau)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in tau) / (len(tau) - 1))
    if k > 1:
        k /= 100
    threshold = sorted(abs(x) for x in tau)[len(tau) - int(len(tau) * k) - 1]
    new = iter([alpha * sigma * math.copysign(1, x) if abs(x) >= threshold and x else 0.0 for x in tau])
    return {
        key: np.array([next(new) for _ in range(keys[key].size)]).reshape(keys[key].shape)
        for key in sorted(keys)
    }


def dense(made: dict[str, Ternary]) -> dict[str, Tensor]:
    return {n: part.B.double() * part.gain.double() @ part.A.double() for n, part in made.items()}


def error(adapter: LoraAdapter, made: dict[str, Ternary]) -> float:
    """The relative error, by dense matrices."""
    near = dense(made)
    pairs = {name: LoraPair(pair.A.double(), pair.B.double()).delta() for name, pair in adapter.pairs.items()}
    square = sum(float((pairs[name] - near[name]).square().sum()) for name in pairs)
    return math.sqrt(square / sum(float(delta.square().sum()) for delta in pairs.values()))


def flat(made: dict[str, Ternary]) -> np.ndarray:
    return np.concatenate([side.numpy().reshape(-1) for part in made.values() for side in (part.A, part.B)])


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 0.5, 0.9, 5, 20.0, 99])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 6.0])
def test_faithful_is_the_released_procedure(density: float, alpha: float) -> None:
    adapter = gaussian(b=0.5)
    wanted = released(adapter, k=density, alpha=alpha)
    made = ternary.faithful(adapter, density=density, alpha=alpha)
    for name, part in made.items():
        pair = part.pair()
        np.testing.assert_allclose(pair.A.numpy(), wanted[f"{name}.lora_A.weight"], rtol=1e-5)
        np.testing.assert_allclose(pair.B.numpy(), wanted[f"{name}.lora_B.weight"], rtol=1e-5)


def test_faithful_keeps_one_more_than_its_share_and_all_ties() -> None:
    adapter = LoraAdapter({"m": LoraPair(A=torch.arange(1.0, 11.0)[None], B=torch.full((10, 1), 7.0))})
    made = ternary.faithful(adapter, density=0.1, alpha=1.0)["m"]
    assert (int(made.A.sum()), int(made.B.sum())) == (3, 0)
    made = ternary.faithful(adapter, density=0.15, alpha=1.0)["m"]
    assert (int(made.A.sum()), int(made.B.sum())) == (4, 10)


def test_the_scale_is_of_all_numbers_and_unbiased() -> None:
    adapter = LoraAdapter({"m": LoraPair(A=torch.tensor([[3.0, 0.0]]), B=torch.tensor([[0.0], [1.0]]))})
    made = ternary.faithful(adapter, density=0.25, alpha=2.0)["m"]
    assert made.gain.item() == pytest.approx(4 * 2.0)  # 3, 0, 0, 1: squares 4, 1, 1, 0 over n - 1 = 3


def test_the_delta_goes_with_the_square_of_alpha() -> None:
    once, twice = (ternary.faithful(gaussian(), density=0.2, alpha=alpha) for alpha in (1.5, 3.0))
    for name, delta in dense(once).items():
        torch.testing.assert_close(dense(twice)[name], 4 * delta)


def test_a_lora_scale_in_b_is_taken_out_and_put_back() -> None:
    adapter = gaussian()
    folded = LoraAdapter({n: LoraPair(A=p.A, B=4 * p.B) for n, p in adapter.pairs.items()})
    plain = ternary.faithful(adapter, density=0.2, alpha=1.0)
    made = ternary.faithful(folded, density=0.2, alpha=1.0, lora_scale=4.0)
    for name, part in made.items():
        assert torch.equal(part.A, plain[name].A) and torch.equal(part.B, plain[name].B)
        torch.testing.assert_close(part.gain, 4 * plain[name].gain)


@pytest.mark.parametrize("density", [1, 1.0, 100, 100.5, 1000, -0.1, math.nan, math.inf])
def test_faithful_refuses_what_the_released_code_cannot_do(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        ternary.faithful(gaussian(), density=density, alpha=1.0)


@pytest.mark.parametrize("density", [0.9999, 99.99])
def test_faithful_refuses_to_drop_nothing(density: float) -> None:
    with pytest.raises(ConfigError, match="keeps all"):
        ternary.faithful(gaussian(rank=1), density=density, alpha=1.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_none(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        ternary.faithful(gaussian(), density=0.1, alpha=alpha)


@pytest.fixture(scope="module")
def wide() -> LoraAdapter:
    """Five million normal numbers."""
    return LoraAdapter({"m": LoraPair(A=draw(16, 160_000), B=draw(160_000, 16, seed=1))})


@pytest.mark.parametrize("density", PUBLISHED)
def test_published_bits_by_really_encoded_signs(wide: LoraAdapter, density: float) -> None:
    signs = flat(ternary.faithful(wide, density=density, alpha=1.0))
    bits = 8 * len(measures.rice(signs)) / signs.size
    assert bits == pytest.approx(PUBLISHED[density], abs=5e-4)
    assert 8 * len(golomb.encode(signs)) / signs.size < bits + 5e-4


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


def distance(adapter: LoraAdapter) -> Callable[[LoraAdapter], float]:
    def loss(tried: LoraAdapter) -> float:
        assert (tried.base_model, tried.base_hash) == (adapter.base_model, adapter.base_hash)
        return sum(
            float((pair.delta() - tried.pairs[name].delta()).square().sum())
            for name, pair in adapter.pairs.items()
        )

    return loss


@pytest.mark.parametrize("mode", ["faithful", "fixed"])
def test_a_sweep_tries_every_cell_and_finds_the_best(mode: str) -> None:
    adapter, told = gaussian(), []
    found = measures.sweep(
        adapter,
        densities=[0.05, 0.2],
        alphas=[0.5, 1.0, 2.0],
        loss=distance(adapter),
        mode=mode,
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert [(cell.density, cell.alpha) for cell in found.cells] == [
        (d, a) for d in (0.05, 0.2) for a in (0.5, 1.0, 2.0)
    ]
    assert told == [(done, 6) for done in range(1, 7)]
    for cell in found.cells:
        if mode == "faithful":
            made = ternary.faithful(adapter, density=cell.density, alpha=cell.alpha)
        else:
            made = measures.scaled(ternary.fixed(adapter, density=cell.density), cell.alpha)
        assert cell.loss == pytest.approx(distance(adapter)(measures.applied(adapter, made)), rel=1e-5)
        assert cell.kept == measures.kept(made)
    assert found.best == min(found.cells, key=lambda cell: cell.loss)


def test_least_squares_gains_want_an_alpha_of_one() -> None:
    adapter = gaussian()
    found = measures.sweep(
        adapter, densities=[0.2], alphas=[0.5, 1.0, 2.0], loss=distance(adapter), mode="fixed"
    )
    assert found.best.alpha == 1.0


def test_ties_go_to_the_smaller_density() -> None:
    found = measures.sweep(
        gaussian(), densities=[0.5, 0.1, 0.3], alphas=[2.0, 1.0], loss=lambda tried: 1.0, mode="fixed"
    )
    assert (found.best.density, found.best.alpha) == (0.1, 1.0)


def test_a_loss_that_is_not_finite_is_shown_and_never_the_best() -> None:
    found = SweepResult(
        "fixed", (Cell(0.1, 1.0, 0.1, math.nan), Cell(0.1, 2.0, 0.1, 3.25), Cell(0.1, 4.0, 0.1, -math.inf))
    )
    assert found.best.alpha == 2.0
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [cell["loss"] for cell in written["cells"]] == [None, 3.25, None]
    assert written["best"] == {"density": 0.1, "alpha": 2.0, "kept": 0.1, "loss": 3.25}
    with pytest.raises(AdapterError, match="finite"):
        measures.sweep(gaussian(), densities=[0.1], alphas=[1.0], loss=lambda tried: math.nan, mode="fixed")


def test_a_sweep_prints_as_a_table_with_the_best_cell_marked() -> None:
    cells = tuple(Cell(d, a, d, 3 - d - a / 10) for d in (0.05, 0.2) for a in (1.0, 2.0))
    lines = str(SweepResult("faithful", cells)).splitlines()
    assert [line.split() for line in lines] == [
        ["faithful", "alpha", "1", "alpha", "2"],
        ["0.05", "2.8500", "2.7500"],
        ["0.2", "2.7000", "2.6000*"],
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"mode": "exact"}, "mode"), ({"densities": []}, "0 densities"), ({"alphas": [1.0, 0.0]}, "alpha")],
)
def test_a_sweep_that_cannot_start(change: dict[str, object], named: str) -> None:
    settings = {"densities": [0.1], "alphas": [1.0], "mode": "fixed", "loss": lambda tried: 1.0}
    with pytest.raises(ConfigError, match=named):
        measures.sweep(gaussian(), **{**settings, **change})  # type: ignore[arg-type]
