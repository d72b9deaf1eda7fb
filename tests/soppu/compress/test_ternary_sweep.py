"""A sweep tries every density and alpha, and finds the best held-out loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from soppu.adapter import LoraAdapter
from soppu.compress.numbers import ternary
from soppu.errors import AdapterError, ConfigError
from tests.soppu.compress import ternary_measures as measures
from tests.soppu.compress.ternary_adapters import gaussian
from tests.soppu.compress.ternary_measures import Cell, SweepResult


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
