from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from soppu.compress.numbers.quantise import COORDS, FLOATS, QUANTISERS, quantise, quantise_coords, scale_of

every_width = pytest.mark.parametrize("width", QUANTISERS)


def gaussian(m: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))


@every_width
def test_the_table_says_what_gaussian_numbers_cost_and_lose(width):
    x = gaussian(400, 1000)
    q = quantise(x, width)
    rest = x - scale_of(x, q)[:, None] * q
    lost = (rest.square().sum(1) / x.square().sum(1)).mean()
    counts = torch.bincount((q + 200).long().reshape(-1)).double()
    shares = counts[counts > 0] / q.numel()
    assert float(lost) == pytest.approx(QUANTISERS[width].distortion, rel=0.03)
    assert float(-(shares * shares.log2()).sum()) == pytest.approx(QUANTISERS[width].rate, abs=0.02)


@every_width
def test_every_width_is_near_the_rate_distortion_bound(width):
    made = QUANTISERS[width]
    bound = -0.5 * math.log2(made.distortion)  # bits a Gaussian number of unit variance takes at least
    assert bound < made.rate < bound + 0.3


@given(st.sampled_from(sorted(QUANTISERS)), st.integers(0, 99), st.floats(-30, 30))
def test_the_scale_of_a_row_does_not_matter(width, seed, power):
    x = gaussian(2, 40, seed)
    scaled = quantise(x * 2.0 ** round(power), width)
    assert torch.equal(scaled, quantise(x, width))
    assert torch.equal(quantise(-x, width), -quantise(x, width))


@given(st.sampled_from(sorted(QUANTISERS)), st.integers(0, 99))
def test_numbers_are_integers_within_the_limit(width, seed):
    x = gaussian(3, 17, seed)
    x[0, 0] = 1e4  # an outlier
    q = quantise(x, width)
    assert q.dtype == torch.float32 and torch.equal(q, q.round())
    assert float(q.abs().max()) <= QUANTISERS[width].limit


@pytest.mark.parametrize("width", [w for w in QUANTISERS if w > 3])
def test_an_outlier_is_kept_from_width_4_on(width):
    x = gaussian(1, 500)
    x[0, 7] = 40.0
    q = quantise(x, width)
    assert float(scale_of(x, q)[0] * q[0, 7]) == pytest.approx(40.0, rel=0.02)


@every_width
def test_rows_of_zeros_stay_and_have_scale_zero(width):
    zeros = torch.zeros(2, 5)
    assert torch.equal(quantise(zeros, width), zeros)
    assert scale_of(gaussian(2, 5), zeros).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("width", FLOATS)
def test_float_widths_keep_floats_of_that_width(width):
    x = gaussian(2, 9)
    assert torch.equal(quantise(x, width), x.to(FLOATS[width]).float())
    assert torch.equal(quantise_coords(x, width), x.to(FLOATS[width]).float())


@given(st.sampled_from(sorted(COORDS)), st.integers(0, 99))
def test_coordinates_are_within_half_a_step(width, seed):
    x = gaussian(3, 8, seed).clamp(-1, 1)
    found = quantise_coords(x, width)
    assert float((found - x).abs().max()) <= 0.5 / COORDS[width] + 1e-6
    steps = found * COORDS[width]
    assert torch.equal(steps.round() / COORDS[width], found)
    assert torch.equal(quantise_coords(found, width), found)


def test_scale_of_is_the_least_squares_factor():
    x, q = gaussian(4, 30, 1).double(), gaussian(4, 30, 2).double()
    scale = scale_of(x, q)
    least = (x - scale[:, None] * q).square().sum(1)
    for other in (scale * 1.01, scale * 0.99):
        assert ((x - other[:, None] * q).square().sum(1) > least).all()
