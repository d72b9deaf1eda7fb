"""Whitening: the norm it makes is the output error, and what is found in its space has less of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soppu.compress.linalg import whitening
from soppu.errors import ConfigError, ModelError

TINY = 1e-9  # a shrink that keeps the roots finite and changes nothing a test could see


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, i: int, *, seed: int = 0, decay: float = 1.0) -> Tensor:
    """Tokens (t, i) whose directions differ in strength by a power law, turned away from the axes."""
    spread = torch.arange(1, i + 1, dtype=torch.float64).pow(-decay)
    turn = torch.linalg.qr(draw(i, i, seed=seed + 1)).Q
    return 3.0 * draw(tokens, i, seed=seed) * spread @ turn


def moments(x: Tensor) -> Tensor:
    return x.T @ x / x.shape[0]


def truncated(D: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(D, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def output_error(D: Tensor, x: Tensor) -> float:
    """Mean over tokens of ||D x||^2, output by output."""
    return float(torch.stack([(D @ token).square().sum() for token in x]).mean())


@pytest.mark.parametrize("power", [1e-6, 1.0, 1e5])
def test_white_input_gives_the_identity_whatever_its_power(power: float) -> None:
    made = whitening.make(power * torch.eye(7))
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(made.forward(eye), eye)
    torch.testing.assert_close(made.back(eye), eye)
    assert made.scale == pytest.approx(power)


def test_a_shrink_of_one_gives_the_identity_for_any_input() -> None:
    made = whitening.make(moments(inputs(50, 6)), shrink=1.0)
    torch.testing.assert_close(made.root, torch.eye(6, dtype=torch.float64))


@given(
    i=st.integers(1, 9),
    tokens=st.integers(1, 20),
    shrink=st.floats(1e-3, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_there_and_back_is_where_one_was(i: int, tokens: int, shrink: float, seed: int) -> None:
    made = whitening.make(moments(inputs(tokens, i, seed=seed)), shrink=shrink)
    A = draw(2, 3, i, seed=seed)
    torch.testing.assert_close(made.back(made.forward(A)), A)
    torch.testing.assert_close(made.forward(made.back(A)), A)


def test_the_root_is_the_root_of_the_shrunk_moments_of_unit_scale() -> None:
    C = moments(inputs(40, 8))
    made = whitening.make(C, shrink=0.1)
    shrunk = 0.9 * C / (C.trace() / 8) + 0.1 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(made.root @ made.root, shrunk)
    torch.testing.assert_close(made.root, made.root.T)
    assert float(shrunk.trace()) == pytest.approx(8)


def test_the_whitened_norm_is_the_mean_squared_output_over_the_tokens() -> None:
    x, B, A = inputs(60, 12), draw(9, 3, seed=3), draw(3, 12, seed=4)
    made = whitening.make(moments(x), shrink=TINY)
    expected = output_error(B @ A, x)
    assert made.scale * float(made.norm(B, A)) ** 2 == pytest.approx(expected, rel=1e-6)
    assert made.scale * float((B @ A @ made.root).square().sum()) == pytest.approx(expected, rel=1e-6)


def test_shrinkage_mixes_the_output_error_with_the_plain_norm() -> None:
    x, B, A = inputs(60, 12), draw(9, 3, seed=3), draw(3, 12, seed=4)
    made = whitening.make(moments(x), shrink=0.25)
    plain = float((B @ A).square().sum()) * made.scale
    expected = 0.75 * output_error(B @ A, x) + 0.25 * plain
    assert made.scale * float(made.norm(B, A)) ** 2 == pytest.approx(expected)


def test_the_norm_of_many_deltas_and_of_a_small_difference() -> None:
    made = whitening.make(moments(inputs(60, 12)))
    B, A = draw(5, 9, 2), draw(5, 2, 12, seed=1)
    dense = torch.stack([made.forward(b @ a).norm() for b, a in zip(B, A, strict=True)])
    torch.testing.assert_close(made.norm(B, A), dense)
    near = A + 1e-9 * draw(5, 2, 12, seed=2)
    found = made.norm(torch.cat([B, -B], -1), torch.cat([A, near], -2))
    expected = torch.stack([made.forward(b @ a).norm() for b, a in zip(B, near - A, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_ranks_above_the_number_of_features_are_no_trouble() -> None:
    made = whitening.make(moments(inputs(30, 4)))
    B, A = draw(3, 6), draw(6, 4, seed=1)
    torch.testing.assert_close(made.norm(B, A), (B @ A @ made.root).norm())


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5), decay=st.floats(0.0, 2.0))
@settings(max_examples=40)
def test_truncation_in_the_whitened_space_is_never_worse_on_the_tokens_it_was_made_from(
    seed: int, rank: int, decay: float
) -> None:
    x, D = inputs(64, 10, seed=seed, decay=decay), draw(8, 10, seed=seed + 2)
    made = whitening.make(moments(x), shrink=TINY)
    whitened = made.back(truncated(made.forward(D), rank))
    assert torch.linalg.matrix_rank(whitened, rtol=1e-9) <= rank
    assert output_error(D - whitened, x) <= output_error(D - truncated(D, rank), x) * (1 + 1e-6)


def test_truncation_in_the_whitened_space_is_better_on_new_tokens() -> None:
    x, D = inputs(400, 16), draw(12, 16, seed=2)
    seen, new = x[:200], x[200:]
    made = whitening.make(moments(seen))
    whitened = made.back(truncated(made.forward(D), 3))
    assert output_error(D - whitened, new) < 0.8 * output_error(D - truncated(D, 3), new)


def test_fewer_tokens_than_features_leave_no_direction_without_weight() -> None:
    x = inputs(3, 10)
    made = whitening.make(moments(x).float(), shrink=0.05)
    least = torch.linalg.eigvalsh(made.root)[0]
    assert float(least) == pytest.approx(0.05**0.5, rel=1e-4)
    eye = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(made.root @ made.inverse_root, eye)


def test_rounding_to_float32_is_forgiven() -> None:
    """A C of rank one has eigenvalues a little below zero once it is rounded."""
    for seed in range(20):
        x = draw(1, 40, seed=seed)
        assert whitening.fault(moments(x).float()) == ""


@pytest.mark.parametrize("shrink", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_shrink_out_of_range_is_named(shrink: float) -> None:
    with pytest.raises(ConfigError, match="shrink = .*above 0 and at most 1"):
        whitening.make(torch.eye(3), shrink=shrink)


@pytest.mark.parametrize(
    ("C", "words"),
    [
        (torch.ones(2, 3), r"shape \(2, 3\)"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(0, 0), "shape"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "NaN or Inf"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), "NaN or Inf"),
        (torch.zeros(3, 3), "trace 0"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "not positive semidefinite"),
        (torch.diag(torch.tensor([1.0, -1e-5])), "not positive semidefinite"),
    ],
)
def test_what_is_no_matrix_of_second_moments_is_refused(C: Tensor, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        whitening.make(C)


def test_participation_counts_the_directions_in_use() -> None:
    assert whitening.participation(torch.eye(6)) == pytest.approx(6)
    assert whitening.participation(torch.diag(torch.tensor([5.0, 5.0, 0.0]))) == pytest.approx(2)
    x = draw(1, 5)
    assert whitening.participation(moments(x)) == pytest.approx(1)
