from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soppu.compress.linalg import bounds, whitening
from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.cores import Cores
from soppu.compress.linalg.range_finder import Sizes, grow
from soppu.compress.linalg.sketch import CorePass, GrowthPass, PowerPass, RangePass, Ranges, rows
from soppu.errors import AdapterError
from tests.soppu.compress import dense_joint as joint
from tests.soppu.compress.large_fit import LargeFit, Search, alone, fit_batches, fit_large, outside

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def fleet(
    n: int, o: int, i: int, r: int, *, own: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A share `own` of the users has an A of its own, the rest began with one; outputs share directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = normal(r, i) / math.sqrt(i)
    mine = (torch.rand(n, generator=generator) < own)[:, None, None]
    ins = torch.where(mine, normal(n, r, i) / math.sqrt(i), first) + 0.25 * normal(n, r, i) / math.sqrt(i)
    shared = torch.linalg.qr(normal(o, min(o, 40)))[0] * torch.arange(1, min(o, 40) + 1) ** -0.6
    outs = shared @ normal(n, shared.shape[1], r) + 0.02 * normal(n, o, r)
    outs = outs * torch.arange(1, r + 1) ** -0.75 * normal(n, 1, 1).exp()
    return outs.to(dtype), ins.to(dtype)


def flat(n: int, o: int, i: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw(n, o, r, seed=seed), draw(n, r, i, seed=seed + 1)


def dense(outs: Tensor, ins: Tensor) -> Tensor:
    return outs.double() @ ins.double()


def units(outs: Tensor, ins: Tensor) -> Tensor:
    deltas = dense(outs, ins)
    norm = torch.linalg.matrix_norm(deltas)
    return torch.where(norm[:, None, None] > 0, deltas / norm.clamp(min=1e-300)[:, None, None], 0.0)


def covariances(outs: Tensor, ins: Tensor) -> tuple[Tensor, Tensor]:
    made = units(outs, ins)
    return (made @ made.mT).sum(0), (made.mT @ made).sum(0)


def assert_canonical(found: Canonical, outs: Tensor, ins: Tensor, *, relative: float = 1e-6) -> None:
    deltas = dense(outs, ins)
    rebuilt = (found.X.double() * found.s.double()[:, None, :]) @ found.Y.double().mT
    size = torch.linalg.matrix_norm(deltas)
    assert bool((torch.linalg.matrix_norm(rebuilt - deltas) <= relative * size).all())
    torch.testing.assert_close(found.norm, size, rtol=relative, atol=0)
    alive = torch.diag_embed((found.s > 0).double())
    for side in (found.X.double(), found.Y.double()):
        torch.testing.assert_close(side.mT @ side, alive, rtol=0, atol=1e-5)
    assert bool((found.s[:, 1:] <= found.s[:, :-1]).all()) and bool((found.s >= 0).all())
    largest = found.X.gather(1, found.X.abs().argmax(1, keepdim=True))
    assert bool((largest >= 0).all())


@pytest.mark.parametrize(("o", "i", "r"), [(40, 30, 4), (4, 30, 4), (30, 5, 5), (50, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_canonical_is_the_singular_value_decomposition(o, i, r, dtype):
    outs, ins = draw(6, o, r, dtype=dtype), draw(6, r, i, seed=1, dtype=dtype)
    found = canonical(outs, ins)
    assert found.X.dtype == found.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_canonical(found, outs, ins, relative=1e-12 if dtype == torch.float64 else 1e-6)
    expected = torch.linalg.svdvals(dense(outs, ins))[:, :r]
    torch.testing.assert_close(found.s.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("what", ["columns", "gauge", "both"])
def test_canonical_holds_for_factors_of_any_condition(condition, what):
    outs, ins = draw(5, 60, 8), draw(5, 8, 40, seed=1)
    scales = torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64)
    turned = torch.linalg.qr(draw(5, 8, 8, seed=2).double())[0] * scales
    if what == "columns":
        outs = (outs.double() * scales).float()
    else:
        outs = (outs.double() @ turned).float()
        if what == "gauge":
            ins = torch.linalg.solve(turned, ins.double()).float()
    assert_canonical(canonical(outs, ins), outs, ins)


def test_canonical_takes_duplicates_zero_columns_and_zero_adapters_beside_others():
    outs, ins = draw(7, 60, 6), draw(7, 6, 40, seed=1)
    outs[1, :, 3] = outs[1, :, 4]
    ins[2, 0] = ins[2, 5]
    outs[3], ins[4] = 0, 0
    outs[5, :, 4:], ins[5, 4:] = 0, 0
    outs[6, :, 1], outs[6, :, 2], ins[6, 2] = 1e-20, 1e20, 1e-18
    found = canonical(outs, ins)
    assert_canonical(found, outs, ins)
    assert found.norm[[3, 4]].tolist() == [0, 0] and not found.s[[3, 4]].any()
    assert torch.isfinite(found.X).all() and torch.isfinite(found.Y).all()
    assert (found.s[5] > 0).tolist() == [True] * 4 + [False] * 2
    assert (found.s[1] > 0).sum() == 5


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e30, 3e37])
def test_canonical_holds_for_factors_of_any_size(scale):
    outs, ins = draw(4, 400, 4), draw(4, 4, 300, seed=1)
    outs[:, :, 1] *= scale
    ins[:, 1] *= min(1 / scale, 3e37)
    found = canonical(outs, ins)
    assert_canonical(found, outs, ins)
    assert torch.isfinite(found.X).all() and torch.isfinite(found.Y).all()


@pytest.mark.parametrize("correlated", [0.0, 3.0])
def test_vectors_of_canonical_are_orthogonal_to_float32(correlated):
    outs, ins = draw(4, 4000, 8), draw(4, 8, 3000, seed=1)
    outs, ins = outs + correlated * outs[:, :, :1], ins + correlated * ins[:, :1]
    found = canonical(outs, ins)
    for side in (found.X.double(), found.Y.double()):
        assert float((side.mT @ side - torch.eye(8, dtype=torch.float64)).abs().max()) < 2e-7
    assert_canonical(found, outs, ins)


def test_canonical_of_factors_that_cancel_is_zero():
    half, ins = draw(1, 20, 3), draw(1, 3, 10, seed=1)
    found = canonical(torch.cat([half, -half], 2), torch.cat([ins, ins], 1))
    assert found.norm.tolist() == [0.0] and not found.s.any()


def test_canonical_takes_more_columns_than_features():
    outs, ins = draw(3, 5, 9), draw(3, 9, 30, seed=1)
    found = canonical(outs, ins)
    assert found.X.shape == (3, 5, 5) and found.Y.shape == (3, 30, 5)
    assert_canonical(found, outs, ins)


def test_canonical_does_not_depend_on_the_batch():
    outs, ins = fleet(9, 30, 20, 4)
    whole, one = canonical(outs, ins), canonical(outs[4:5], ins[4:5])
    torch.testing.assert_close(whole.X[4:5], one.X, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.s[4:5], one.s, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_canonical_leaves_its_factors_alone_unless_told_otherwise(dtype):
    outs, ins = draw(3, 30, 4, dtype=dtype), draw(3, 4, 20, seed=1, dtype=dtype)
    outs, before = outs.mT.contiguous().mT, (outs.clone(), ins.clone())
    plain = canonical(outs, ins)
    assert torch.equal(outs, before[0]) and torch.equal(ins, before[1])
    again = canonical(outs, ins, overwrite=True)
    assert torch.equal(again.X, plain.X) and torch.equal(again.s, plain.s) and torch.equal(again.Y, plain.Y)
    taken = dtype == torch.float32
    assert (again.X.data_ptr() == outs.data_ptr()) == (again.Y.data_ptr() == ins.data_ptr()) == taken


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_canonical_refuses_what_is_not_finite(bad):
    outs, ins = draw(2, 8, 2) + 10, draw(2, 2, 8, seed=1) + 10
    outs[1, 3, 1] = bad
    with pytest.raises(AdapterError, match="delta"):
        canonical(outs, ins)


def test_canonical_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(AdapterError, match=r"\(2, 8, 2\) and \(2, 3, 8\)"):
        canonical(draw(2, 8, 2), draw(2, 3, 8))


def sketched(batches: list[Canonical], width: int, *, users: list[list[int]] | None = None) -> Ranges:
    made = RangePass(batches[0].X.shape[1], batches[0].Y.shape[1], width=width, seed=3)
    for index, batch in enumerate(batches):
        made.add(batch, None if users is None else users[index])
    return made.finish()


def cut(outs: Tensor, ins: Tensor, size: int) -> list[Canonical]:
    return [canonical(b, a) for b, a in zip(outs.split(size), ins.split(size), strict=True)]


def projector(columns: Tensor) -> Tensor:
    return columns @ columns.mT


def test_range_pass_does_not_depend_on_batches_nor_on_order_where_users_are_numbered():
    outs, ins = fleet(12, 50, 40, 3)
    whole = sketched(cut(outs, ins, 12), 8)
    for size in (1, 5, 7):
        cut_up = sketched(cut(outs, ins, size), 8)
        torch.testing.assert_close(projector(cut_up.out), projector(whole.out), rtol=0, atol=1e-4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = sketched(cut(outs[order], ins[order], 4), 8, users=[part.tolist() for part in order.split(4)])
    torch.testing.assert_close(projector(mixed.inn), projector(whole.inn), rtol=0, atol=1e-4)
    other = sketched(cut(outs[order], ins[order], 4), 8)
    assert float((projector(other.inn) - projector(whole.inn)).abs().max()) > 1e-2


def test_ranges_are_orthonormal_and_not_wider_than_there_are_columns():
    ranges = sketched(cut(*fleet(3, 50, 40, 2), 3), 20)
    assert ranges.out.shape == (50, 6) and ranges.inn.shape == (40, 6)
    for side in (ranges.out, ranges.inn):
        torch.testing.assert_close(side.mT @ side, torch.eye(6).double(), rtol=0, atol=1e-12)


def test_power_pass_improves_the_ranges_and_orders_them_by_energy():
    outs, ins = fleet(60, 80, 70, 4)
    batches = cut(outs, ins, 25)
    rough = sketched(batches, 12)
    power = PowerPass(rough)
    for batch in batches:
        power.add(batch)
    made = power.finish()
    for gram, before, after, image in (
        (covariances(outs, ins)[0], rough.out, made.ranges.out, made.images[0]),
        (covariances(outs, ins)[1], rough.inn, made.ranges.inn, made.images[1]),
    ):
        values = torch.linalg.svdvals(image.applied)
        torch.testing.assert_close(after.mT @ after, torch.eye(12).double(), rtol=0, atol=1e-9)
        energy = (after.mT @ gram @ after).diagonal()
        assert float(energy.sum()) > float((before.mT @ gram @ before).trace())
        exact = torch.linalg.eigvalsh(gram).flip(0)
        ritz = torch.linalg.eigvalsh(before.mT @ gram @ before).flip(0)
        assert bool((values <= exact[:12] * (1 + 1e-5)).all()) and bool((values >= ritz * (1 - 1e-5)).all())
    assert made.total == 60


def test_images_are_what_c_does_to_directions_and_probes():
    outs, ins = fleet(20, 30, 25, 3)
    power = PowerPass(sketched(cut(outs, ins, 20), 6), probes=4, seed=9)
    for batch in cut(outs, ins, 7):
        power.add(batch)
    made = power.finish()
    for image, gram in zip(made.images, covariances(outs, ins), strict=True):
        torch.testing.assert_close(image.applied, gram @ image.basis, rtol=0, atol=1e-4)
        torch.testing.assert_close(image.applied_probes, gram @ image.probes, rtol=0, atol=1e-4)
        assert float((image.basis.mT @ image.probes).abs().max()) < 1e-12


@pytest.mark.parametrize("exact", [(False, False), (True, False), (False, True), (True, True)])
def test_a_power_pass_gives_all_eigenvalues_of_the_sides_asked_for(exact):
    outs, ins = fleet(20, 30, 25, 3)
    power = PowerPass(sketched(cut(outs, ins, 20), 6), exact=exact)
    for batch in cut(outs, ins, 7):
        power.add(batch)
    for spectrum, gram, asked in zip(power.finish().spectra, covariances(outs, ins), exact, strict=True):
        assert (spectrum is not None) == asked
        if spectrum is not None:
            torch.testing.assert_close(spectrum, torch.linalg.eigvalsh(gram), rtol=0, atol=1e-5)


def test_a_whitened_form_is_the_form_of_the_whitened_factors():
    outs, ins = fleet(4, 30, 25, 3)
    x = draw(200, 25, seed=7)
    whitener = whitening.make(x.mT @ x / len(x))
    found, expected = (
        canonical(outs, ins, whitener=whitener),
        canonical(outs, whitener.forward(ins).to(ins.dtype)),
    )
    assert torch.equal(found.X, expected.X) and torch.equal(found.s, expected.s)
    assert not torch.allclose(found.s, canonical(outs, ins).s)


def cores_of(batches: list[Canonical], ranges: Ranges) -> Cores:
    made = CorePass(ranges, (sum(len(one.s) for one in batches), max(one.s.shape[1] for one in batches)))
    for batch in batches:
        made.add(batch)
    return made.finish()


def test_cores_are_projections_and_what_they_miss_is_known():
    outs, ins = fleet(10, 40, 30, 3)
    outs[4] = 0
    cores = cores_of(cut(outs, ins, 4), sketched(cut(outs, ins, 10), 7))
    made = units(outs, ins)
    inside = cores.left.double().mT @ cores.right.double()
    torch.testing.assert_close(inside, cores.basis_out.mT @ made @ cores.basis_in, rtol=0, atol=1e-6)
    missed = made - projector(cores.basis_out) @ made @ projector(cores.basis_in)
    torch.testing.assert_close(outside(cores), missed.square().sum((1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(cores.norm, torch.linalg.matrix_norm(dense(outs, ins)), rtol=1e-6, atol=0)
    assert cores.norm[4] == 0 and outside(cores)[4] == 0 and cores.total == 9
    for (values, _), gram, basis in zip(
        cores.ritz(), covariances(outs, ins), (cores.basis_out, cores.basis_in), strict=True
    ):
        expected = torch.linalg.eigvalsh(basis.mT @ gram @ basis).flip(0)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


def test_growth_is_a_step_of_the_alternation_and_orthogonal_to_what_is_there():
    outs, ins = fleet(30, 60, 50, 3)
    batches = cut(outs, ins, 30)
    cores = cores_of(batches, sketched(batches, 9))
    found = cores.fit(4, max_steps=500, least=0)  # u is then the leading space that belongs to v
    grower = GrowthPass(cores, cores.directions(found, 6))
    for batch in cut(outs, ins, 11):
        grower.add(batch)
    more = grower.finish()
    assert more.out.shape == (60, 6)
    assert float((cores.basis_out.mT @ more.out).abs().max()) < 1e-12
    made, v = units(outs, ins), cores.basis_in @ found.V
    step = (made @ projector(v) @ made.mT).sum(0) @ (cores.basis_out @ found.U)
    both = torch.cat([cores.basis_out, more.out], 1)
    left = step - projector(both) @ step
    assert float(left.norm()) < 1e-4 * float((step - projector(cores.basis_out) @ step).norm())


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


def test_rows_of_a_canonical_form_are_a_view():
    made = canonical(draw(5, 20, 3), draw(5, 3, 10, seed=1))
    assert rows(made.X).data_ptr() == made.X.data_ptr()
    assert torch.equal(rows(made.X)[4], made.X[1, :, 1])


def test_search_takes_at_least_k_directions():
    outs, ins = fleet(20, 50, 40, 3)
    fit = fit_large(outs, ins, rank=9, search=replace(Search(), width=2, growths=0))
    assert fit.U.shape == (50, 9) and fit.width == (9, 9) and fit.passes == 2
