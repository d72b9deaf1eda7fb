"""Bootstrap intervals: against a plain loop, and whether they hold what they say they hold."""

from __future__ import annotations

import numpy as np
import pytest

from soppu.evaluate import intervals
from soppu.evaluate.intervals import DRAWS, Interval, interval


def plain(sums: list[float], weights: list[float], *, seed: int) -> list[float]:
    """Every draw's mean, sorted, one number at a time."""
    generator, n = np.random.default_rng(seed), len(sums)
    means = []
    for _ in range(DRAWS):
        units = generator.integers(n, size=n)
        total = weight = 0.0
        for unit in units:
            total, weight = total + sums[unit], weight + weights[unit]
        means.append(total / weight)
    return sorted(means)


def test_it_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    sums, weights = rng.normal(1.0, 3.0, 9), rng.integers(5, 40, 9).astype(float)
    found, means = interval(sums, weights, seed=7), plain(list(sums), list(weights), seed=7)
    assert found.mean == pytest.approx(sums.sum() / weights.sum())
    tail = intervals._tail(9) * (DRAWS - 1)  # numpy's quantile: between the two nearest of the sorted
    below, share = int(tail), tail % 1
    low = means[below] * (1 - share) + means[below + 1] * share
    high = means[-1 - below] * (1 - share) + means[-2 - below] * share
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_pieces_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, weights = np.random.default_rng(2).normal(size=(2, 30)) ** 2
    whole = interval(sums, weights, seed=3)
    monkeypatch.setattr(intervals, "_AT_ONCE", 31 * 7)
    assert interval(sums, weights, seed=3) == whole != interval(sums, weights, seed=4)


@pytest.mark.parametrize("n", [8, 12, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_true_mean_is_inside_as_often_as_it_should(n: int, skewed: bool) -> None:
    """95 % of 500 experiments; their own spread is 1 %. Plain percentiles of 8 units would hold 89 %."""
    rng = np.random.default_rng(n)
    inside = 0
    for seed in range(500):
        values = rng.exponential(0.05, n) if skewed else rng.normal(0.05, 0.1, n)
        found = interval(values, np.ones(n), seed=seed, draws=600)
        assert found.low is not None and found.high is not None
        inside += found.low <= 0.05 <= found.high
    assert (0.88 if skewed else 0.92) <= inside / 500 <= 0.985


def test_what_pairs_have_in_common_does_not_widen_it() -> None:
    rng = np.random.default_rng(5)
    common, own = rng.normal(0, 1.0, 16), rng.normal(0, 0.01, 16)
    paired = interval((common + 0.05 + own) - common, np.ones(16), seed=0)
    assert paired.low is not None and 0.03 < paired.low < paired.mean < 0.07


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_units_have_wide_intervals_or_none(n: int) -> None:
    values = np.arange(1.0, n + 1)
    found = interval(values, np.ones(n), seed=0)
    assert found == (Interval(1.0) if n == 1 else Interval(float(values.mean()), 1.0, float(n)))


@pytest.mark.parametrize(("freedom", "quantile"), [(5, 2.571), (8, 2.306), (11, 2.201), (30, 2.042)])
def test_students_quantiles_are_those_of_the_table(freedom: int, quantile: float) -> None:
    assert intervals._student(freedom) == pytest.approx(quantile, rel=3e-3)
