from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.numbers.quantise import AXIS
from soppu.errors import AdapterError
from tests.soppu.compress import dense_joint as joint


def dense_hooi(deltas: Tensor, k: int, steps: int) -> tuple[list[float], Tensor, Tensor]:
    """The method written down plainly: o x i matrices, o x o Grams, dense eigen-decompositions."""
    units = deltas / torch.linalg.matrix_norm(deltas)[:, None, None]

    def top(gram: Tensor) -> Tensor:
        return torch.linalg.eigh(gram).eigenvectors[:, -k:]

    u = top(sum(d @ d.T for d in units))
    v = top(sum(d.T @ d for d in units))
    objective = [sum(float((u.T @ d @ v).square().sum()) for d in units)]
    for _ in range(steps):
        u = top(sum(d @ v @ v.T @ d.T for d in units))
        v = top(sum(d.T @ u @ u.T @ d for d in units))
        objective.append(sum(float((u.T @ d @ v).square().sum()) for d in units))
    return objective, u, v


def dense(outs: list[Tensor], ins: list[Tensor]) -> Tensor:
    return torch.stack([b.double() @ a.double() for b, a in zip(outs, ins, strict=True)])


def rebuilt(fit: joint.JointFit) -> Tensor:
    return fit.norm[:, None, None] * (fit.U @ fit.left @ fit.right @ fit.V.T)


@pytest.mark.parametrize(("o", "i"), [(20, 17), (60, 9), (9, 60), (60, 50)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_objective_equals_the_dense_iteration(factors, o, i, k):
    outs, ins = factors((3, 3, 3, 3, 3), o, i)
    expected, _, _ = dense_hooi(dense(outs, ins), k, 6)
    fit = joint.fit(outs, ins, rank=k, max_steps=6, tolerance=0.0)
    assert fit.objective == pytest.approx(expected[: len(fit.objective)], rel=1e-9)
    assert fit.objective[-1] == pytest.approx(expected[-1], rel=1e-9)


def test_reconstruction_equals_the_dense_iteration(factors):
    outs, ins = factors((3, 3, 3, 3), 18, 15)
    deltas = dense(outs, ins)
    _, u, v = dense_hooi(deltas, 5, 4)
    fit = joint.fit(outs, ins, rank=5, max_steps=4, tolerance=0.0)
    torch.testing.assert_close(rebuilt(fit), u @ u.T @ deltas @ v @ v.T, rtol=0, atol=1e-9)


def test_bases_are_orthonormal_and_cores_are_projections(factors):
    outs, ins = factors((4, 2, 3), 22, 13)
    fit = joint.fit(outs, ins, rank=5)
    torch.testing.assert_close(fit.U.T @ fit.U, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(fit.V.T @ fit.V, torch.eye(5, dtype=torch.float64))
    deltas = dense(outs, ins)
    torch.testing.assert_close(fit.norm, torch.linalg.matrix_norm(deltas))
    torch.testing.assert_close(
        fit.left @ fit.right, fit.U.T @ (deltas / fit.norm[:, None, None]) @ fit.V, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("k", [12, 13, 1000])
def test_full_rank_is_exact(factors, k):
    outs, ins = factors((3, 3, 3, 3), 40, 30)
    fit = joint.fit(outs, ins, rank=k)
    assert fit.U.shape[1] == fit.V.shape[1] == 12
    assert fit.achieved == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(rebuilt(fit), dense(outs, ins), rtol=0, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_adapter_is_its_truncated_svd(factors, k):
    outs, ins = factors((4,), 14, 11)
    (delta,) = dense(outs, ins)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    fit = joint.fit(outs, ins, rank=k)
    torch.testing.assert_close(rebuilt(fit)[0], u[:, :k] @ torch.diag(s[:k]) @ vt[:k], rtol=0, atol=1e-9)
    assert fit.lower_bound == pytest.approx(fit.achieved, abs=1e-12)


def test_the_gauge_of_a_pair_does_not_matter(factors):
    outs, ins = factors((3, 3, 3), 15, 12)
    gauge = torch.tensor([[2.0, 1, 0], [0, 50, 3], [1, 0, 0.02]], dtype=torch.float64)
    turned = joint.fit([b @ gauge for b in outs], [torch.linalg.solve(gauge, a) for a in ins], rank=4)
    plain = joint.fit(outs, ins, rank=4)
    torch.testing.assert_close(turned.U, plain.U, rtol=0, atol=1e-8)
    torch.testing.assert_close(rebuilt(turned), rebuilt(plain), rtol=0, atol=1e-8)


def test_the_scale_of_one_adapter_changes_only_its_norm(factors):
    outs, ins = factors((3, 3, 3), 15, 12)
    plain = joint.fit(outs, ins, rank=4)
    louder = joint.fit([outs[0] * 1e6, outs[1], outs[2] * 1e-6], ins, rank=4)
    torch.testing.assert_close(louder.U, plain.U, rtol=0, atol=1e-9)
    torch.testing.assert_close(louder.left, plain.left, rtol=0, atol=1e-9)
    scales = torch.tensor([1e6, 1, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(louder.norm, plain.norm * scales)


def test_the_order_of_users_does_not_matter(factors):
    outs, ins = factors((3, 1, 4, 2), 15, 12)
    order = [2, 0, 3, 1]
    plain = rebuilt(joint.fit(outs, ins, rank=4))
    mixed = rebuilt(joint.fit([outs[n] for n in order], [ins[n] for n in order], rank=4))
    torch.testing.assert_close(mixed, plain[order], rtol=0, atol=1e-9)


def test_different_ranks_are_the_same_as_zero_padding(factors):
    outs, ins = factors((1, 5, 3), 15, 12)
    padded_outs = [torch.cat([b, b.new_zeros(15, 5 - b.shape[1])], 1) for b in outs]
    padded_ins = [torch.cat([a, a.new_zeros(5 - a.shape[0], 12)], 0) for a in ins]
    ragged = joint.fit(outs, ins, rank=4, max_steps=3, tolerance=0.0)
    padded = joint.fit(padded_outs, padded_ins, rank=4, max_steps=3, tolerance=0.0)
    assert ragged.objective == pytest.approx(padded.objective, rel=1e-9)
    torch.testing.assert_close(rebuilt(ragged), rebuilt(padded), rtol=0, atol=1e-9)


def test_a_rank_above_the_features_is_taken(factors):
    outs, ins = factors((9, 2), 5, 7)
    fit = joint.fit(outs, ins, rank=50)
    assert fit.U.shape == (5, 5) and fit.V.shape == (7, 5)
    left_out = dense(outs, ins) @ (torch.eye(7).double() - fit.V @ fit.V.T)
    assert float(left_out.norm()) < float(dense(outs, ins).norm())
    assert fit.lower_bound <= fit.achieved <= fit.upper_bound


def test_zero_and_absent_adapters_have_norm_zero_and_no_weight(factors):
    outs, ins = factors((3, 3), 15, 12)
    alone = joint.fit(outs, ins, rank=4)
    more = joint.fit(
        [outs[0], torch.zeros(15, 2).double(), outs[1], outs[0][:, :0]],
        [ins[0], torch.randn(2, 12).double(), ins[1], ins[0][:0]],
        rank=4,
    )
    assert more.norm[1] == 0 and more.norm[3] == 0 and more.total == 2
    torch.testing.assert_close(rebuilt(more)[[0, 2]], rebuilt(alone), rtol=0, atol=1e-9)
    assert not rebuilt(more)[[1, 3]].any()


def test_factors_that_cancel_are_a_zero_adapter(factors):
    outs, ins = factors((3,), 15, 12)
    fit = joint.fit([torch.cat([outs[0], -outs[0]], 1)], [torch.cat([ins[0], ins[0]], 0)], rank=4)
    assert fit.norm.tolist() == [0.0] and fit.achieved == 0


def test_nothing_but_zero_adapters(factors):
    _, ins = factors((3, 3), 15, 12)
    fit = joint.fit([torch.zeros(15, 3)] * 2, ins, rank=4)
    assert fit.total == fit.achieved == fit.lower_bound == fit.upper_bound == 0
    assert torch.isfinite(fit.U).all() and not rebuilt(fit).any()


def test_duplicates_need_no_more_rank_than_one(factors):
    outs, ins = factors((3,), 15, 12)
    fit = joint.fit(outs * 4, ins * 4, rank=3)
    torch.testing.assert_close(rebuilt(fit), dense(outs * 4, ins * 4), rtol=0, atol=1e-9)


def test_bfloat16_is_computed_in_float64(factors):
    outs, ins = factors((3, 3, 3), 15, 12, dtype=torch.bfloat16)
    wide = joint.fit([b.double() for b in outs], [a.double() for a in ins], rank=4)
    fit = joint.fit(outs, ins, rank=4)
    assert torch.equal(fit.U, wide.U) and fit.objective == wide.objective


def test_a_norm_beyond_float32_is_refused():
    with pytest.raises(AdapterError, match="allowed"):
        joint.fit([torch.ones(3, 1).double() * 1e200], [torch.ones(1, 3).double()], rank=1)


@settings(max_examples=200)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    o=st.integers(1, 24),
    i=st.integers(1, 24),
    k=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    noise=st.sampled_from([0.0, 1e-9, 1e-3, 1.0]),
)
def test_certificate_and_objective_hold_for_any_fleet(ranks, o, i, k, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(o, 3, generator=generator, dtype=torch.float64)
    outs = [left @ torch.randn(3, r, generator=generator, dtype=torch.float64) for r in ranks]
    outs = [b + noise * torch.randn(b.shape, generator=generator, dtype=torch.float64) for b in outs]
    ins = [torch.randn(r, i, generator=generator, dtype=torch.float64) for r in ranks]
    fit = joint.fit(outs, ins, rank=k, tolerance=0.0, max_steps=4)
    assert 0 <= fit.lower_bound <= fit.achieved <= fit.upper_bound
    gains = [b - a for a, b in zip(fit.objective, fit.objective[1:], strict=False)]
    assert all(gain >= -1e-12 * fit.total for gain in gains)
    units = dense(outs, ins)[fit.norm > 0] / fit.norm[fit.norm > 0][:, None, None]
    left_over = units - (fit.U @ fit.left @ fit.right @ fit.V.T)[fit.norm > 0]
    assert float(left_over.square().sum()) == pytest.approx(fit.achieved, abs=1e-9)


def test_no_basis_beats_the_lower_bound(factors):
    outs, ins = factors((3,) * 5, 20, 16)
    units = dense(outs, ins)
    units = units / torch.linalg.matrix_norm(units)[:, None, None]
    fit = joint.fit(outs, ins, rank=4)
    for seed in range(5):
        torch.manual_seed(seed)
        u, _ = torch.linalg.qr(fit.U + 0.1 * torch.randn(20, 4).double())
        v, _ = torch.linalg.qr(fit.V + 0.1 * torch.randn(16, 4).double())
        error = float((units - u @ u.T @ units @ v @ v.T).square().sum())
        assert fit.lower_bound <= error


def test_large_steps_by_sweeps_agree_with_exact_ones(factors):
    outs, ins = factors((4,) * 40, 130, 150, shared=20)
    exact = joint.fit(outs, ins, rank=12, tolerance=0.0, max_steps=10)
    swept = joint.fit(outs, ins, rank=12, tolerance=1e-7)
    assert swept.objective[-1] == pytest.approx(exact.objective[-1], rel=1e-6)
    assert all(b >= a - 1e-12 for a, b in zip(swept.objective, swept.objective[1:], strict=False))


def test_sweeps_find_the_leading_space():
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(200, 200).double())
    root = basis * torch.arange(1, 201).double() ** -0.5
    start, _ = torch.linalg.qr(basis[:, :6] + 0.02 * torch.randn(200, 6).double())
    found = joint._follow(root, start, least=1e-12)
    torch.testing.assert_close(found @ found.T, basis[:, :6] @ basis[:, :6].T, rtol=0, atol=1e-5)


def test_it_stops_after_two_quiet_steps_or_at_the_limit(factors):
    outs, ins = factors((3,) * 5, 20, 16, shared=20)
    assert joint.fit(outs, ins, rank=4, max_steps=0).steps == 0
    assert joint.fit(outs, ins, rank=4, max_steps=3, tolerance=0.0).steps == 3
    fit = joint.fit(outs, ins, rank=4, max_steps=500, tolerance=1e-4)
    gains = [b - a for a, b in zip(fit.objective, fit.objective[1:], strict=False)]
    quiet = [gain < 1e-4 * fit.total for gain in gains]
    assert quiet[-2:] == [True, True]
    assert not any(a and b for a, b in zip(quiet[:-2], quiet[1:-1], strict=True))


def test_the_sign_of_every_column_is_fixed(factors):
    outs, ins = factors((3, 3, 3), 15, 12)
    fit = joint.fit(outs, ins, rank=4)
    flipped = joint.fit([-b for b in outs], ins, rank=4)
    for basis in (fit.U, fit.V, flipped.U, flipped.V):
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(flipped.U, fit.U, rtol=0, atol=1e-12)
    torch.testing.assert_close(rebuilt(flipped), -rebuilt(fit), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("k", "thin"), [(6, False), (7, True), (9, True)])
def test_thin_cores_add_no_error(factors, k, thin):
    outs, ins = factors((3, 1, 3, 2), 25, 22)
    bundle = compressed(outs, ins, k)
    (part,) = bundle.components(0)
    assert bool((part.left.coords_width > AXIS).all()) is thin
    left = bundle.report.certificates["q"].achieved
    assert sum(e**2 for e in bundle.report.relative_error.values()) == pytest.approx(left, rel=1e-4, abs=1e-6)
    assert part.user.bincount().tolist() == ([3, 1, 3, 2] if thin else [k] * 4)


def test_a_zero_adapter_of_large_rank_does_not_widen_thin_cores(factors):
    outs, ins = factors((2, 2, 2), 25, 22)
    bundle = compressed([*outs, torch.zeros(25, 9).double()], [*ins, torch.ones(9, 22).double()], 6)
    (part,) = bundle.components(0)
    assert bool((part.left.coords_width > AXIS).all())
    assert part.user.bincount(minlength=4).tolist() == [2, 2, 2, 0]


def compressed(outs: list[Tensor], ins: list[Tensor], k: int) -> Bundle:
    """All users of one module as the method that ships keeps them, in 32 bits."""
    pairs = zip(outs, ins, strict=True)
    fleet = {f"user{n}": LoraAdapter({"q": LoraPair(A=a, B=b)}, "tiny") for n, (b, a) in enumerate(pairs)}
    return compress(fleet, CompressOptions(method="joint", rank=k, basis_bits=32, core_bits=32))
