from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from soppu.compress.linalg import whitening
from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.cores import Cores
from soppu.compress.linalg.sketch import CorePass, GrowthPass, PowerPass, Ranges, rows
from soppu.errors import AdapterError
from tests.soppu.compress.fleets import covariances, cut, dense, draw, fleet, sketched, units
from tests.soppu.compress.large_fit import outside

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time


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


def test_rows_of_a_canonical_form_are_a_view():
    made = canonical(draw(5, 20, 3), draw(5, 3, 10, seed=1))
    assert rows(made.X).data_ptr() == made.X.data_ptr()
    assert torch.equal(rows(made.X)[4], made.X[1, :, 1])
