from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soppu.compress.bundle.report import CompressionReport
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.errors import relative_errors, squared_errors
from soppu.compress.numbers.quantise import AXIS, TERNARY
from tests.soppu.compress.handmade import Form, components

SHAPE, K = (25, 19), (6, 5)
FORMS: list[list[Form]] = [
    [(8, 0, 8, 0), (0, 4, 0, 5), (6, 3, 8, 2)],
    [],
    [(AXIS, 0, 16, 0), (0, TERNARY, 32, 0)],
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(seed: int = 0) -> tuple[Tensor, Tensor]:
    made = [torch.linalg.qr(draw(d, k, seed=seed + d))[0].float() for d, k in zip(SHAPE, K, strict=True)]
    return made[0], made[1]


def stored(seed: int = 0) -> Components:
    return components(FORMS, SHAPE, K, torch.Generator().manual_seed(seed))


def dense(parts: Components, pair: tuple[Tensor, Tensor], norm: Tensor) -> Tensor:
    """(n, o, i) float64, one component after the other."""
    left, right = (
        side.vectors(basis).double() for side, basis in zip((parts.left, parts.right), pair, strict=True)
    )
    made = torch.zeros(len(norm), *SHAPE, dtype=torch.float64)
    for j, user in enumerate(parts.user.tolist()):
        made[user] += float(norm[user]) * float(parts.gain[j]) * torch.outer(left[j], right[j])
    return made


def factored(d: Tensor) -> tuple[Tensor, Tensor]:
    """B and A of full rank with B A = D."""
    u, s, vt = torch.linalg.svd(d, full_matrices=False)
    return u * s[:, None], vt


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_errors_are_those_of_dense_matrices(seed, rank):
    parts, pair, norm = stored(seed), bases(seed), draw(3, seed=seed).abs().float()
    B, A = draw(3, SHAPE[0], rank, seed=seed), draw(3, rank, SHAPE[1], seed=seed + 1)
    found = squared_errors(B, A, parts, pair, norm=norm)
    expected = (B @ A - dense(parts, pair, norm)).square().sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_exact_reconstruction_reports_round_off_not_its_root():
    parts, pair, norm = stored(), bases(), torch.tensor([1.0, 0.0, 300.0])
    whole = dense(parts, pair, norm)
    B, A = factored(whole)
    error = squared_errors(B, A, parts, pair, norm=norm).sqrt() / whole.norm(dim=(1, 2)).clamp(min=1)
    assert float(error.max()) < 1e-13


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-11])
def test_small_errors_are_measured_to_the_end(size):
    parts, pair, norm = stored(), bases(), torch.ones(3)
    whole = dense(parts, pair, norm)
    B, A = factored(whole)
    found = squared_errors(B * (1 + size), A, parts, pair, norm=norm).sqrt()
    expected = size * whole.norm(dim=(1, 2))
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-2, atol=0)


def test_swapped_components_raise_the_error():
    parts, pair, norm = stored(), bases(), torch.ones(3)
    B, A = factored(dense(parts, pair, norm))
    swapped = replace(parts, gain=parts.gain.flip(0))
    right = squared_errors(B, A, parts, pair, norm=norm)
    wrong = squared_errors(B, A, swapped, pair, norm=norm)
    assert (wrong[[0, 2]] > 1e6 * right[[0, 2]]).all() and wrong[1] == right[1] == 0


def test_without_components_the_error_is_the_norm_itself():
    none = stored().select(torch.zeros(5, dtype=torch.bool))
    B, A = draw(3, SHAPE[0], 2), draw(3, 2, SHAPE[1])
    found = squared_errors(B, A, none, bases(), norm=torch.ones(3))
    torch.testing.assert_close(found, (B @ A).square().sum((1, 2)))


def test_a_module_without_a_basis_needs_none():
    parts = components([[(0, 4, 0, 5)]], SHAPE, (0, 0), torch.Generator().manual_seed(0))
    delta = (
        float(parts.gain[0]) * torch.outer(parts.left.vectors(None)[0], parts.right.vectors(None)[0]).double()
    )
    B, A = factored(delta[None])
    assert float(squared_errors(B, A, parts, (None, None), norm=torch.ones(1))) < 1e-12


def test_a_zero_adapter_has_error_zero():
    squared, norm = torch.tensor([0.0, 4.0, 0.25]), torch.tensor([0.0, 4.0, 0.0])
    assert relative_errors(squared, norm).tolist() == [0.0, 0.5, 0.0]


def test_coordinates_of_all_widths_stand_in_one_table():
    side: Side = stored().left
    table = side.coordinates(K[0])
    assert table.shape == (5, K[0])
    assert table[3].tolist() == [1.0] + [0.0] * 5 and not table[[1, 4]].any()
    torch.testing.assert_close(table[[0, 2]], side.coords)
    no_basis = components([[(0, 4, 0, 5)]], SHAPE, (0, 0), torch.Generator().manual_seed(0))
    assert no_basis.left.coordinates(0).shape == (1, 0)


def report() -> CompressionReport:
    return CompressionReport(
        method="joint",
        rank=4,
        clusters=2,
        target="16x",
        whitened=True,
        seed=3,
        device="cpu",
        storage="basis int8, cores int8",
        parameters_before=100,
        parameters_after=40,
        seconds=1.5,
        k_used={"q": 4, "v": 2},
        steps={"q": 2, "v": 0},
        relative_error={"a": 0.25, "b": 0.75},
        module_error={"q": {"a": 0.25, "b": 0.75}, "v": {"a": 0.0}},
        certificates={"q": Certificate(0.5, 0.72, 0.9, 2.0), "v": Certificate(0.0, 0.0, 0.1, 2.0, 0.75)},
    )


def test_report_survives_its_dictionary():
    assert CompressionReport.from_dict(report().to_dict()) == report()


def test_report_means_worst_and_overall_certificate():
    value = report().to_dict()
    assert value["relative_error_mean"] == 0.5 and value["relative_error_max"] == 0.75
    assert value["relative_error_rms"] == math.sqrt((0.25**2 + 0.75**2) / 2)
    overall = report().overall
    assert overall == Certificate(0.5, 0.72, 1.0, 4.0, 0.75)
    assert overall.relative_lower_bound == math.sqrt(0.5 / 4)
    assert value["overall"]["relative_achieved"] == math.sqrt(0.72 / 4)


def test_doubts_about_bounds_add_up_but_not_beyond_certainty():
    two = replace(report(), certificates={m: Certificate(0, 0, 0, 1, 0.25) for m in "qv"})
    assert two.overall.confidence == 0


def test_certificate_of_nothing_is_zero():
    nothing = Certificate(0.0, 0.0, 0.0, 0.0)
    assert nothing.relative_lower_bound == nothing.relative_achieved == 0


@pytest.mark.parametrize("key", ["k_used", "certificates", "parameters_after", "storage"])
def test_report_without_a_key_is_refused(key):
    value = report().to_dict()
    del value[key]
    with pytest.raises(ValueError, match=key):
        CompressionReport.from_dict(value)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("rank", "many"), ("k_used", {"q": 1.5}), ("relative_error", 1.0), ("certificates", {"q": {}})],
)
def test_report_with_a_value_of_another_kind_is_refused(key, wrong):
    with pytest.raises(ValueError, match=key):
        CompressionReport.from_dict(report().to_dict() | {key: wrong})
