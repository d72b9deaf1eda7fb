"""Lower bounds of large fits: never violated, tight, and no surer than they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from soppu.compress.linalg import bounds
from soppu.compress.linalg.sketch import PowerPass
from tests.soppu.compress.fleets import covariances, cut, draw, flat, fleet, sketched
from tests.soppu.compress.large_fit import LargeFit, Search, fit_large


def bounded(outs: Tensor, ins: Tensor, k: int, *, seed: int, powers: int) -> LargeFit:
    effort = bounds.Effort(powers=powers, exact_side=0, seed=seed)
    return fit_large(outs, ins, rank=k, search=Search(growths=2, width=k + 4, bound=effort, seed=seed))


@pytest.mark.parametrize("powers", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [fleet, flat])
def test_the_lower_bound_is_never_violated(make, powers):
    for seed in range(6):
        outs, ins = make(40, 90, 70, 3, seed=seed)
        tails = [float(torch.linalg.eigvalsh(gram).flip(0)[4:].sum()) for gram in covariances(outs, ins)]
        fit = bounded(outs, ins, 4, seed=seed, powers=powers)
        assert fit.lower_bound <= max(tails) + 1e-9 <= fit.achieved + 1e-4
        assert 1 - 1e-10 <= fit.confidence <= 1


def test_the_bound_is_tight_after_three_powers():
    for make, within in ((fleet, 0.02), (flat, 0.05)):
        outs, ins = make(150, 200, 180, 3)
        best = max(float(torch.linalg.eigvalsh(gram).flip(0)[4:].sum()) for gram in covariances(outs, ins))
        fit = bounded(outs, ins, 4, seed=0, powers=3)
        assert (1 - within) * best <= fit.lower_bound <= best


def test_a_bound_without_probes_is_certain():
    outs, ins = fleet(40, 90, 70, 3, own=0.0)
    fit = fit_large(outs, ins, rank=4, search=Search(bound=None))
    tails = [float(torch.linalg.eigvalsh(gram).flip(0)[4:].sum()) for gram in covariances(outs, ins)]
    assert fit.confidence == 1 and 0 <= fit.lower_bound <= max(tails)


def test_bounds_from_a_power_pass_hold_and_probes_sharpen_them():
    outs, ins = flat(60, 120, 110, 3)
    batches = cut(outs, ins, 60)
    plain, probed = PowerPass(sketched(batches, 10)), PowerPass(sketched(batches, 10), probes=48, seed=5)
    for batch in batches:
        plain.add(batch)
        probed.add(batch)
    truth = float(torch.linalg.eigvalsh(covariances(outs, ins)[0]).flip(0)[:5].sum())
    eps = torch.finfo(torch.float32).eps
    certain = bounds.top_sum(plain.finish().images[0], 5, trace=60, eps=eps)
    likely = bounds.top_sum(probed.finish().images[0], 5, trace=60, eps=eps)
    assert truth <= likely.value < certain.value <= 60
    assert certain.confidence == 1 and likely.confidence == 1 - bounds.FAILURE


def powers_of(gram: Tensor, probes: int, count: int, seed: int) -> list[Tensor]:
    made = [draw(len(gram), probes, seed=seed, dtype=torch.float64)]
    for _ in range(count):
        made.append(gram @ made[-1])
    return made


@pytest.mark.parametrize("spectrum", ["flat", "one", "steps", "decay", "few", "zero"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_norm_bound_is_above_the_norm_and_below_what_is_certain(spectrum, count):
    d = 100
    values = {
        "flat": torch.ones(d),
        "one": torch.ones(d).index_fill(0, torch.tensor([0]), 30.0),
        "steps": torch.tensor([5.0, 3.0, 1.0, 0.1]).repeat_interleave(25),
        "decay": torch.arange(1, d + 1) ** -1.5,
        "few": torch.ones(d) * (torch.arange(d) < 3),
        "zero": torch.zeros(d),
    }[spectrum].double()
    turn = torch.linalg.qr(draw(d, d, seed=8, dtype=torch.float64))[0]
    gram = turn * values @ turn.mT
    for seed in range(5):
        powers = powers_of(gram, 16, count, seed)
        found = bounds.norm_bound(powers, most=float(values.sum()), noise=1e-14, failure=1e-10)
        assert float(values.max()) * (1 - 1e-9) <= found <= max(float(values.sum()), 1e-9)


def test_norm_bound_is_sharper_than_the_lemma_it_extends():
    gram = torch.diag(torch.linspace(2, 0.5, 150, dtype=torch.float64))
    powers = powers_of(gram, 10, 3, 0)
    found = bounds.norm_bound(powers, most=1e3, noise=1e-14, failure=1e-10)
    largest = float(powers[-1].norm(dim=0).max())
    lemma = (10 * math.sqrt(2 / math.pi) * largest) ** (1 / 3)
    assert 2 <= found < 0.7 * lemma


def test_norm_bound_stands_round_off_of_float32():
    gram = torch.diag(torch.linspace(1, 0.1, 100, dtype=torch.float64))
    powers = [draw(100, 16, seed=1, dtype=torch.float64)]
    for seed in range(4):
        noise = 1e-5 * draw(100, 100, seed=seed, dtype=torch.float64) / 20
        powers.append((gram + noise) @ powers[-1])
    found = bounds.norm_bound(powers, most=100.0, noise=1e-5, failure=1e-10)
    assert 1 <= found < 3


@pytest.mark.parametrize("freedom", [1, 10, 32])
def test_chi_squared_quantile_matches_its_distribution(freedom):
    sample = draw(200_000, freedom, seed=3).square().sum(1)
    found = bounds.chi_squared_quantile(freedom, 0.05)
    assert float((sample < found).double().mean()) == pytest.approx(0.05, abs=0.005)
