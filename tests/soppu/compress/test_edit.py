from __future__ import annotations

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress, forget, project
from soppu.errors import AdapterError, BundleError

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

SHAPES = {"layers.0.q": (160, 128), "layers.1.v": (96, 128)}


@pytest.fixture
def adapters(fleet) -> dict[str, LoraAdapter]:
    return fleet((3, 3, 2, 3, 3, 3), shapes=SHAPES)


def error(adapter: LoraAdapter, other: LoraAdapter) -> float:
    deltas = [(pair.delta(), other.pairs[name].delta()) for name, pair in adapter.pairs.items()]
    wrong = sum(float((a - b).square().sum()) for a, b in deltas)
    return (wrong / sum(float(a.square().sum()) for a, _ in deltas)) ** 0.5


METHODS = {
    "joint": CompressOptions(method="joint", rank=6),
    "cluster": CompressOptions(method="cluster", rank=6, clusters=2),
    "residual": CompressOptions(max_error=0.4),
    "svd": CompressOptions(method="svd", max_error=0.4),
}
every = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())


@every
@pytest.mark.parametrize("limit", [0.9, 0.3, 0.05])
def test_a_new_user_is_in_the_bundle_within_the_error_allowed(adapters, options, limit):
    new = adapters.pop("user5")
    before = compress(adapters, options)
    made = project(before, "user5", new, max_error=limit)
    assert made.outcome in ("basis", "residual") and made.error <= limit
    bundle = Bundle.from_bytes(made.bundle.to_bytes())
    assert bundle.users == (*before.users, "user5")
    assert error(new, bundle.reconstruct("user5")) == pytest.approx(made.error, abs=1e-4)
    assert bundle.report.relative_error["user5"] == pytest.approx(made.error, rel=1e-5)
    for user in before.users:
        for name, pair in before.reconstruct(user).pairs.items():
            assert torch.equal(pair.B, bundle.reconstruct(user).pairs[name].B)


def test_coordinates_are_enough_for_a_user_the_basis_spans(adapters):
    new = adapters.pop("user5")
    mixed = LoraAdapter(
        {
            name: LoraPair(
                A=torch.cat([adapters["user0"].pairs[name].A, adapters["user1"].pairs[name].A[:1]]),
                B=torch.cat([adapters["user0"].pairs[name].B, adapters["user1"].pairs[name].B[:, :1]], 1),
            )
            for name in new.pairs
        },
        "tiny",
        "b" * 64,
    )
    bundle = compress(adapters, CompressOptions(method="joint", rank=14))
    inside = project(bundle, "mixed", mixed, max_error=0.1)
    outside = project(bundle, "user5", new, max_error=0.1)
    assert (inside.outcome, outside.outcome) == ("basis", "residual")
    assert inside.added < outside.added


def test_a_user_who_does_not_fit_waits_and_nothing_changes(adapters):
    new = adapters.pop("user5")
    bundle = compress(adapters, CompressOptions(max_error=0.5))
    made = project(bundle, "user5", new, max_error=0.01, max_bytes=200)
    assert made.outcome == "queued" and made.bundle is bundle and made.added > 200
    assert made.error > 0


def test_newcomers_that_do_not_belong_are_refused(adapters):
    new = adapters.pop("user5")
    bundle = compress(adapters, METHODS["joint"])
    with pytest.raises(BundleError, match="already"):
        project(bundle, "user0", new, max_error=0.5)
    with pytest.raises(AdapterError, match="base model"):
        project(bundle, "x", LoraAdapter(new.pairs, "tiny", "c" * 64), max_error=0.5)
    with pytest.raises(AdapterError, match=r"x: made for base model unknown \(other\), the bundle .*--base"):
        project(bundle, "x", LoraAdapter(new.pairs, "other"), max_error=0.5)
    other = {"layers.9.k": new.pairs["layers.0.q"]}
    with pytest.raises(AdapterError, match=r"layers\.9\.k.*None"):
        project(bundle, "x", LoraAdapter(other, "tiny", "b" * 64), max_error=0.5)


@pytest.mark.parametrize("options", [*METHODS.values(), CompressOptions(method="ternary", density=0.3)])
def test_forgetting_takes_a_users_numbers_and_nobody_elses(adapters, options):
    bundle = compress(adapters, options)
    rest = Bundle.from_bytes(forget(bundle, "user2").to_bytes())
    assert rest.users == tuple(user for user in adapters if user != "user2")
    assert "user2" not in rest.report.relative_error
    with pytest.raises(BundleError, match="user2"):
        rest.reconstruct("user2")
    for user in rest.users:
        for name, pair in bundle.reconstruct(user).pairs.items():
            assert torch.equal(pair.A, rest.reconstruct(user).pairs[name].A)
    assert len(rest.to_bytes()) < len(bundle.to_bytes())


def test_a_basis_remembers_whom_it_has_seen_until_it_is_fitted_again(adapters):
    bundle = compress(adapters, METHODS["joint"])
    once = forget(bundle, "user1")
    twice = Bundle.from_bytes(forget(once, "user4").to_bytes())
    assert twice.basis_saw == (bundle.adapter_ids[1], bundle.adapter_ids[4])
    left = {user: adapter for user, adapter in adapters.items() if user in twice.users}
    assert compress(left, METHODS["joint"]).basis_saw == ()
    assert forget(compress(adapters, METHODS["svd"]), "user1").basis_saw == ()


def test_coming_and_going_leaves_the_bundle_as_it_was(adapters):
    new = adapters.pop("user5")
    bundle = compress(adapters, METHODS["joint"])
    there = project(bundle, "user5", new, max_error=0.5).bundle
    back = forget(there, "user5")
    assert [page.data for page in back.pages] == [page.data for page in bundle.pages]
    assert back.report.parameters_before == bundle.report.parameters_before
    assert back.report.parameters_after == bundle.report.parameters_after


def test_the_last_user_cannot_be_taken_out(fleet):
    bundle = compress(fleet((2,)), METHODS["joint"])
    with pytest.raises(BundleError, match="only one"):
        forget(bundle, "user0")
