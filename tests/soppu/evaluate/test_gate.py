"""The gate: each rule on its own, its borders, users without a gain, and everything that was not measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soppu.config import GateConfig
from soppu.errors import GateError
from soppu.evaluate.gate import TOLERANCE, Verdict, check
from soppu.evaluate.losses import UserLosses

LIMITS = GateConfig(
    min_mean_gain_kept=0.9, min_user_gain_kept=0.5, max_relative_error=0.7, min_improved_users=1.0
)
LENIENT = GateConfig(
    min_mean_gain_kept=-10.0, min_user_gain_kept=-10.0, max_relative_error=10.0, min_improved_users=0.0
)


def user(
    name: str, base: float = 3.0, personal: float = 2.5, compressed: float = 2.51, *, examples: int = 16
) -> UserLosses:
    return UserLosses(name, examples, base, personal, compressed)


def judge(*losses: UserLosses, options: GateConfig = LIMITS, **errors: float) -> Verdict:
    return check(losses, {one.user: 0.2 for one in losses} | errors, options)


def test_a_good_bundle_passes_with_its_figures() -> None:
    verdict = judge(user("alice"), user("bob", 2.0, 1.0, 1.1), bob=0.3)
    assert verdict.passed and verdict.reasons == ()
    assert verdict.mean_gain_kept == pytest.approx((0.49 + 0.9) / (0.5 + 1.0))
    assert (verdict.worst_user, verdict.worst_gain_kept) == ("bob", pytest.approx(0.9))
    assert (verdict.worst_error_user, verdict.max_relative_error) == ("bob", 0.3)
    assert verdict.improved_share == 1.0
    verdict.raise_if_refused()


@pytest.mark.parametrize(
    ("losses", "errors", "key", "named"),
    [
        ([user("alice", 3.0, 2.5, 2.6), user("bob", 3.0, 2.5, 2.59)], {}, "min_mean_gain_kept", "alice"),
        (
            [user("alice", 3.0, 1.0, 1.0), user("bob", 3.0, 2.9, 2.96)],
            {},
            "min_user_gain_kept",
            "bob keeps",
        ),
        ([user("alice"), user("bob")], {"bob": 0.71}, "max_relative_error", "bob 0.71"),
        ([user("alice"), user("bob", 3.0, 3.1, 3.0)], {}, "min_improved_users", "bob (3.1000, base 3.0000)"),
    ],
)
def test_each_broken_rule_gives_one_reason_with_key_limit_and_user(
    losses: list[UserLosses], errors: dict[str, float], key: str, named: str
) -> None:
    verdict = judge(*losses, **errors)
    assert not verdict.passed
    (reason,) = verdict.reasons
    assert reason.startswith(f"gate.{key}: ")
    assert str(getattr(LIMITS, key)) in reason and named in reason


def test_every_broken_rule_is_reported_at_once() -> None:
    verdict = judge(user("alice", personal=3.2, compressed=3.2), user("bob", compressed=2.9), alice=0.9)
    keys = [reason.split(":")[0] for reason in verdict.reasons]
    assert keys == [
        "gate.min_mean_gain_kept",
        "gate.min_user_gain_kept",
        "gate.max_relative_error",
        "gate.min_improved_users",
    ]
    with pytest.raises(GateError) as caught:
        verdict.raise_if_refused()
    assert caught.value.reasons == list(verdict.reasons)


def test_limits_themselves_are_allowed() -> None:
    halves = [user("alice", 3.0, 2.0, 2.5), user("bob", 3.0, 3.0, 3.0)]
    exactly = GateConfig(
        min_mean_gain_kept=0.5, min_user_gain_kept=0.5, max_relative_error=0.7, min_improved_users=0.5
    )
    assert judge(*halves, options=exactly, alice=0.7).passed
    above = math.nextafter(0.5, 1.0)
    assert not judge(*halves, options=replace(exactly, min_user_gain_kept=above)).passed
    assert not judge(*halves, options=replace(exactly, min_mean_gain_kept=above)).passed
    assert not judge(*halves, options=replace(exactly, min_improved_users=above)).passed
    assert not judge(*halves, options=exactly, alice=math.nextafter(0.7, 1.0)).passed


def test_a_value_just_beyond_its_limit_is_not_shown_as_the_limit() -> None:
    (reason,) = judge(user("alice"), alice=0.70001).reasons
    assert "alice 0.70001" in reason


@pytest.mark.parametrize("gain", [0.0, -0.3, TOLERANCE / 2])
@pytest.mark.parametrize(("worse", "passes"), [(-0.2, True), (TOLERANCE / 2, True), (2 * TOLERANCE, False)])
def test_a_user_without_a_gain_must_not_end_above_the_base_model(
    gain: float, worse: float, passes: bool
) -> None:
    options = replace(LENIENT, min_user_gain_kept=0.5)
    verdict = judge(user("alice", 3.0, 3.0 - gain, 3.0 + worse), options=options)
    assert verdict.passed is passes
    assert verdict.worst_user == ""
    assert all("gate.min_user_gain_kept" in reason and "alice" in reason for reason in verdict.reasons)


def test_a_user_who_lost_does_not_cover_for_one_who_gained() -> None:
    losses = [user("alice", 3.0, 2.0, 2.4), user("bob", 3.0, 3.9, 3.0)]
    verdict = judge(*losses, options=replace(LENIENT, min_mean_gain_kept=0.9))
    assert verdict.mean_gain_kept == pytest.approx(0.6)
    assert not verdict.passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["base", "personal", "compressed"])
def test_a_loss_that_is_not_finite_is_refused_whatever_the_limits(place: str, value: float) -> None:
    verdict = judge(user("alice"), replace(user("bob"), **{place: value}), options=LENIENT)
    (reason,) = verdict.reasons
    assert f"bob {place} loss {value}" in reason and "alice" not in reason
    assert verdict.mean_gain_kept == pytest.approx(0.98)
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_relative_error_that_is_not_finite_is_refused() -> None:
    (reason,) = judge(user("alice"), options=LENIENT, alice=math.nan).reasons
    assert "alice relative error nan" in reason


def test_all_losses_nan_is_one_reason_and_no_crash() -> None:
    verdict = judge(user("alice", math.nan, math.nan, math.nan))
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["not finite", "gate.min_improved_users"]


def test_what_was_not_measured_does_not_pass() -> None:
    assert check([], {"alice": 0.1}, LENIENT).reasons == ("no user's held-out loss was measured",)
    assert "alice (no held-out examples)" in judge(user("alice", examples=0), options=LENIENT).reasons[0]
    assert "alice (no relative error)" in check([user("alice")], {}, LENIENT).reasons[0]


def test_users_without_a_loss_are_listed_and_judged_by_their_error() -> None:
    verdict = judge(user("alice"), bob=0.3)
    assert verdict.passed and verdict.unmeasured == ("bob",)
    assert "bob" in judge(user("alice"), bob=0.8).reasons[0]


def test_many_faults_are_counted_and_not_all_spelt_out() -> None:
    losses = [user(f"user-{number:03d}", compressed=2.9) for number in range(200)]
    reasons = judge(*losses).reasons
    assert any("and 190 more" in reason for reason in reasons)
    assert max(map(len, reasons)) < 500


def test_a_verdict_survives_json() -> None:
    verdict = judge(user("alice"), user("bob", compressed=2.9), carol=0.2)
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    with pytest.raises(KeyError, match="worst_user"):
        Verdict.from_dict({"passed": True, "reasons": [], "mean_gain_kept": 1.0})


LOSS = st.floats(min_value=0.5, max_value=5.0)


@given(st.lists(st.tuples(LOSS, LOSS, LOSS), min_size=1, max_size=6))
def test_order_does_not_matter_and_lossless_keeps_everything(
    values: list[tuple[float, float, float]],
) -> None:
    losses = [user(f"user-{number}", *three) for number, three in enumerate(values)]
    assert judge(*losses).passed == judge(*reversed(losses)).passed
    assert judge(*losses).mean_gain_kept == judge(*reversed(losses)).mean_gain_kept
    exact = [replace(one, compressed=one.personal) for one in losses]
    verdict = judge(*exact, options=replace(LENIENT, min_mean_gain_kept=0.0))
    assert verdict.worst_gain_kept == pytest.approx(1.0) or verdict.worst_user == ""
    assert verdict.mean_gain_kept in (0.0, pytest.approx(1.0))
