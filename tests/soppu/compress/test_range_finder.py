"""The joint method in few passes: what it finds is what the exact method finds, wherever ranges began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soppu.compress.linalg import bounds
from soppu.compress.linalg.canonical import canonical
from soppu.compress.linalg.range_finder import Sizes, grow
from tests.soppu.compress import dense_joint as joint
from tests.soppu.compress.fleets import cut, dense, draw, flat, fleet, units
from tests.soppu.compress.large_fit import Search, alone, fit_batches, fit_large


def test_ranges_that_began_with_a_sample_end_where_the_others_do_in_fewer_numbers():
    outs, ins = fleet(512, 300, 260, 4)
    whole = fit_large(outs, ins, rank=6, search=Search(tolerance=1e-5))
    sampled = fit_large(outs, ins, rank=6, search=Search(tolerance=1e-5, every=4))
    assert sampled.objective[0] > 1.5 * whole.objective[0] and sampled.passes < whole.passes
    assert sampled.objective[-1] == pytest.approx(whole.objective[-1], rel=1e-4)


def test_narrowed_ranges_hold_what_smaller_bases_need():
    outs, ins = fleet(200, 120, 100, 3)
    batches = cut(outs, ins, 64)
    grown = alone(grow(Sizes(200, 120, 100, 3), 6, Search(tolerance=1e-6)), lambda: batches)
    narrow = grown.narrowed(20)
    assert narrow.cores.left.shape[2] == narrow.cores.right.shape[2] == 20 < grown.cores.left.shape[2]
    at_found = narrow.cores.fit(6, max_steps=0, least=0.0, start=narrow.found)
    assert at_found.objective[0] == pytest.approx(grown.found.objective[-1], rel=1e-6)
    for k in (2, 4, 6):
        whole, kept = (one.cores.fit(k, max_steps=20, least=1e-6) for one in (grown, narrow))
        assert kept.objective[-1] == pytest.approx(whole.objective[-1], rel=1e-3)


def test_a_sample_of_zero_adapters_is_no_worse_than_nothing():
    outs, ins = fleet(192, 120, 100, 3)
    outs[:64], outs[128:] = 0, 0
    fit = fit_large(outs, ins, rank=4, search=Search(every=2, tolerance=1e-6))
    assert fit.objective[-1] == pytest.approx(exact(outs[64:128], ins[64:128], 4).objective[-1], rel=1e-3)


def rebuilt(fit: joint.JointFit) -> Tensor:
    return fit.norm[:, None, None] * (fit.U @ fit.left @ fit.right @ fit.V.mT)


def exact(outs: Tensor, ins: Tensor, k: int, tolerance: float = 1e-7) -> joint.JointFit:
    return joint.fit(list(outs), list(ins), rank=k, max_steps=100, tolerance=tolerance)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize(("o", "i"), [(20, 17), (60, 9), (60, 50)])
def test_ranges_that_span_everything_give_the_exact_method(o, i, k):
    outs, ins = fleet(6, o, i, 2, dtype=torch.float64)
    search = Search(width=60, tolerance=1e-13, max_steps=200)
    fit = fit_large(outs, ins, rank=k, search=search)
    expected = exact(outs, ins, k, 1e-13)
    assert fit.objective[-1] == pytest.approx(expected.objective[-1], rel=1e-9)
    assert fit.lower_bound == pytest.approx(expected.lower_bound, abs=1e-9)
    assert not fit.outside.any() or float(fit.outside.max()) < 1e-12
    assert fit.confidence == 1


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_objective_is_that_of_the_exact_method_where_the_ranges_are_small(own):
    outs, ins = fleet(120, 300, 260, 4, own=own)
    fit = fit_large(outs, ins, rank=6, search=Search(width=12, tolerance=1e-5))
    expected = exact(outs, ins, 6)
    assert max(fit.width) < 0.5 * 260
    assert fit.objective[-1] == pytest.approx(expected.objective[-1], rel=1e-4)
    assert fit.total == expected.total == 120
    assert fit.lower_bound <= expected.achieved * (1 + 1e-6) and fit.achieved <= fit.upper_bound


@pytest.mark.parametrize("make", [fleet, flat])
def test_the_objective_never_falls_and_is_what_the_basis_captures(make):
    outs, ins = make(50, 90, 80, 3)
    fit = fit_large(outs, ins, rank=5, search=Search(width=10))
    steps = zip(fit.objective, fit.objective[1:], strict=False)
    assert len(fit.objective) > 3 and all(after >= before - 1e-9 for before, after in steps)
    cores = fit.U.mT @ units(outs, ins) @ fit.V
    assert float(cores.square().sum()) == pytest.approx(fit.objective[-1], rel=1e-6)
    torch.testing.assert_close(fit.left @ fit.right, cores, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.U.mT @ fit.U, torch.eye(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(fit.V.mT @ fit.V, torch.eye(5).double(), rtol=0, atol=1e-9)
    errors = (units(outs, ins) - fit.U @ cores @ fit.V.mT).square().sum((1, 2))
    assert bool((fit.outside <= errors + 1e-6).all())


@pytest.mark.parametrize("size", [1, 7, 40])
def test_batches_of_any_size_give_what_memory_gives(size):
    outs, ins = fleet(40, 70, 60, 3)
    search = Search(width=12, bound=bounds.Effort(powers=2))
    whole = fit_large(outs, ins, rank=4, search=search)
    batches = cut(outs, ins, size)
    streamed = fit_batches(lambda: iter(batches), (70, 60), rank=4, search=search)
    assert streamed.objective[-1] == pytest.approx(whole.objective[-1], rel=1e-5)
    assert streamed.lower_bound == pytest.approx(whole.lower_bound, rel=1e-4)
    torch.testing.assert_close(rebuilt(streamed), rebuilt(whole), rtol=0, atol=1e-3 * float(whole.norm.max()))


def test_the_order_of_users_does_not_matter():
    outs, ins = fleet(60, 100, 90, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    search = Search(tolerance=1e-8, max_steps=50, width=20)
    plain = fit_large(outs, ins, rank=4, search=search)
    mixed = fit_large(outs[order], ins[order], rank=4, search=search)
    assert mixed.objective[-1] == pytest.approx(plain.objective[-1], rel=1e-5)
    difference = (rebuilt(mixed) - rebuilt(plain)[order]) / plain.norm[order, None, None]
    assert float(torch.linalg.matrix_norm(difference).mean()) < 1e-3


def test_narrow_adapters_are_the_same_as_zero_padding():
    outs, ins = fleet(30, 60, 50, 4)
    outs[::3, :, 2:], ins[::3, 2:] = 0, 0
    batches = cut(outs, ins, 10)
    ragged = [
        canonical(outs[:1, :, :2], ins[:1, :2]),
        canonical(outs[1:10], ins[1:10]),
        *batches[1:],
    ]
    padded = fit_batches(lambda: batches, (60, 50), rank=4)
    mixed = fit_batches(lambda: ragged, (60, 50), rank=4)
    assert mixed.objective[-1] == pytest.approx(padded.objective[-1], rel=1e-6)
    assert padded.objective[-1] == pytest.approx(exact(outs, ins, 4).objective[-1], rel=1e-4)


def test_zero_adapters_have_no_weight_and_no_error():
    outs, ins = fleet(20, 50, 40, 3)
    outs[[2, 9]] = 0
    kept = [n for n in range(20) if n not in (2, 9)]
    fit = fit_large(outs, ins, rank=4)
    alone = fit_large(outs[kept], ins[kept], rank=4)
    assert fit.total == 18 and fit.norm[[2, 9]].tolist() == [0, 0]
    assert not (fit.left @ fit.right)[[2, 9]].any() and not fit.outside[[2, 9]].any()
    assert fit.objective[-1] == pytest.approx(alone.objective[-1], rel=1e-4)


def test_a_fleet_of_zero_adapters_has_nothing_to_capture():
    fit = fit_large(torch.zeros(4, 20, 2), torch.zeros(4, 2, 15), rank=3)
    assert fit.total == 0 and fit.achieved == 0 and fit.lower_bound == 0
    assert not rebuilt(fit).any() and torch.isfinite(fit.U).all()


@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_one_adapter_is_its_truncated_decomposition(k):
    outs, ins = draw(1, 40, 3), draw(1, 3, 30, seed=1)
    fit = fit_large(outs, ins, rank=k)
    u, s, vt = torch.linalg.svd(dense(outs, ins)[0], full_matrices=False)
    kept = min(k, 3)
    expected = (u[:, :kept] * s[:kept]) @ vt[:kept]
    torch.testing.assert_close(rebuilt(fit)[0], expected, rtol=0, atol=1e-5 * float(s[0]))
    assert fit.U.shape == (40, kept)


def test_more_rank_than_there_are_columns_is_lossless():
    outs, ins = fleet(4, 50, 40, 2)
    fit = fit_large(outs, ins, rank=100)
    assert fit.U.shape == (50, 8)
    assert fit.achieved == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(rebuilt(fit).float(), outs @ ins, rtol=0, atol=1e-5 * float(fit.norm.max()))


def test_the_seed_fixes_the_result():
    outs, ins = fleet(30, 60, 50, 3)
    first, again = fit_large(outs, ins, rank=4), fit_large(outs, ins, rank=4)
    assert torch.equal(first.U, again.U) and first.lower_bound == again.lower_bound
    other = fit_large(outs, ins, rank=4, search=Search(seed=1))
    assert not torch.equal(first.U, other.U)


def test_search_takes_at_least_k_directions():
    outs, ins = fleet(20, 50, 40, 3)
    fit = fit_large(outs, ins, rank=9, search=replace(Search(), width=2, growths=0))
    assert fit.U.shape == (50, 9) and fit.width == (9, 9) and fit.passes == 2
