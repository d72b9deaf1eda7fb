"""Rank, error and bytes are as asked for, and the certificate holds for what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soppu.compress import CompressOptions, compress
from soppu.errors import BundleError

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

RICH = {"model.layers.0.q": (96, 80), "model.layers.1.down": (64, 120)}


def test_a_joint_fit_as_stored_is_no_better_than_the_certificate_allows(fleet):
    adapters = fleet((3,) * 5, shapes=RICH)
    report = compress(adapters, CompressOptions(method="joint", rank=6, basis_bits=32, core_bits=32)).report
    for name, part in report.certificates.items():
        stored = sum(value**2 for value in report.module_error[name].values())
        assert part.lower_bound <= stored * (1 + 1e-3) + 1e-9
        assert stored == pytest.approx(part.achieved, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"method": "joint"}, {"method": "joint-diag"}, {"method": "cluster", "clusters": 2}],
    ids=lambda options: options["method"],
)
@pytest.mark.parametrize("rank", [2, 5])
def test_what_the_certificate_says_was_achieved_is_what_32_bits_store(fleet, options, rank):
    adapters = fleet((3, 2, 3, 3, 1, 3), shapes=RICH)
    stored = CompressOptions(rank=rank, basis_bits=32, core_bits=32, **options)
    report = compress(adapters, stored).report
    coarse = compress(adapters, replace(stored, basis_bits=4, core_bits=4)).report
    for name, part in report.certificates.items():
        mean = sum(value**2 for value in report.module_error[name].values()) / part.total
        assert mean == pytest.approx(part.achieved / part.total, abs=1e-4)
        rounded = sum(value**2 for value in coarse.module_error[name].values())
        assert coarse.certificates[name].achieved <= rounded + 1e-6


@pytest.mark.parametrize("allowed", [16_000, 30_000])
@pytest.mark.parametrize("method", ["joint", "joint-diag", "cluster"])
def test_the_largest_rank_that_fits_is_found(fleet, method, allowed):
    adapters = fleet((8,) * 6, shapes={"q": (256, 320)}, seed=5)
    options = CompressOptions(method=method, clusters=2 if method == "cluster" else 1, max_bytes=allowed)
    found = compress(adapters, options)
    rank = max(found.report.k_used.values())
    sizes = [
        len(compress(adapters, replace(options, rank=k, max_bytes=0)).to_bytes()) for k in (rank, rank + 1)
    ]
    assert len(found.to_bytes()) <= allowed
    if rank < max(min(48, options.rank), 1):
        assert sizes[1] > allowed
    if sizes[1] - sizes[0] < 0.05 * allowed and sizes[1] > allowed:
        assert len(found.to_bytes()) > 0.95 * allowed


def test_the_smallest_rank_within_an_error_is_found(fleet):
    adapters = fleet((4,) * 6, shapes={"q": (60, 50)}, seed=5)
    options = CompressOptions(method="joint", max_error=0.5)
    rank = max(compress(adapters, options).report.k_used.values())
    below = compress(adapters, replace(options, max_error=0.0, rank=rank - 1)).report
    assert below.relative_error_max > 0.5


@pytest.mark.parametrize("method", ["residual", "svd"])
@pytest.mark.parametrize("limit", [0.6, 0.3, 0.1, 0.02])
def test_no_user_is_above_the_error_asked_for(fleet, method, limit):
    report = compress(
        fleet((3, 2, 3, 1), shapes=RICH), CompressOptions(method=method, max_error=limit)
    ).report
    assert report.relative_error_max <= limit
    assert report.relative_error_max > limit / 4  # and it is not bought with bytes nobody asked for


@pytest.mark.parametrize("method", ["residual", "svd", "joint", "ternary"])
@pytest.mark.parametrize("allowed", [9000, 14000])
def test_the_file_is_no_larger_than_asked_for(fleet, method, allowed):
    adapters = fleet((8,) * 4, shapes={"q": (256, 320)})
    bundle = compress(adapters, CompressOptions(method=method, max_bytes=allowed))
    size = len(bundle.to_bytes())
    assert size <= allowed
    if method in ("residual", "svd"):
        assert size > 0.97 * allowed


def test_more_bytes_mean_less_error(fleet):
    adapters = fleet((4,) * 5, shapes={"q": (200, 160)})
    errors = [
        compress(adapters, CompressOptions(ratio=ratio)).report.relative_error_rms
        for ratio in (8.0, 4.0, 2.0)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_where_users_are_alike_the_default_shares_and_beats_what_does_not(fleet):
    adapters = fleet((3,) * 16, shapes={"q": (200, 160)}, seed=3)
    allowed = 12_000
    shared, alone = (
        compress(adapters, CompressOptions(method=method, max_bytes=allowed))
        for method in ("residual", "svd")
    )
    assert max(shared.report.k_used.values()) > 0 and max(alone.report.k_used.values()) == 0
    assert shared.report.relative_error_rms < 0.9 * alone.report.relative_error_rms


def test_a_target_out_of_reach_is_refused_with_both_sizes(fleet):
    with pytest.raises(BundleError, match="100 bytes.*smallest"):
        compress(fleet((2, 2)), CompressOptions(max_bytes=100))
    with pytest.raises(BundleError, match="no shared rank"):
        compress(fleet((2, 2)), CompressOptions(method="joint", max_error=1e-6, rank=2))


def test_report_says_what_was_asked_and_used(fleet):
    adapters = fleet((3, 3), shapes={"q": (20, 16), "k": (4, 16)})
    calls: list[tuple[str, int, int]] = []
    options = CompressOptions(method="joint", rank=5, seed=9)
    bundle = compress(adapters, options, progress=lambda *step: calls.append(step))
    report = bundle.report
    assert calls and all(0 < done <= total == 2 for _, done, total in calls)
    assert (report.rank, report.seed, report.method, report.clusters) == (5, 9, "joint", 1)
    assert report.k_used == {"k": 4, "q": 5} and report.seconds > 0
    assert [side.k for side in bundle.bases["k"][0]] == [4, 4]
    assert compress(fleet((3, 3), shapes=RICH), CompressOptions(ratio=2.0)).report.target == "2x"
