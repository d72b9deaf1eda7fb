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
from soppu.evaluate.gate import Verdict, check
from soppu.evaluate.losses import TOLERANCE, ExampleLosses, UserLosses

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
        ([user("alice"), user("bob", 3.0, 3.1, 3.0)], {}, "min_improved_users", "bob (3.0000, base 3.0000)"),
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


def beside(name: str, over_shared: float, *, noise: float = 0.0, **changes: object) -> UserLosses:
    """A user who is served this much better than with the shared adapter, give or take, on 16 examples."""
    losses = replace(user(name), shared=2.51 + over_shared, **changes)  # type: ignore[arg-type]
    wobble = [noise * (-1) ** number for number in range(16)]
    sums = {name: (10.0 * getattr(losses, name),) * 16 for name in ("base", "personal", "compressed")}
    sums["shared"] = tuple(10 * (2.51 + over_shared + one) for one in wobble)
    return replace(losses, each=ExampleLosses((10,) * 16, sums))


@pytest.mark.parametrize(
    ("gains", "passes"),
    [
        ((0.1, 0.2, 0.3), True),
        ((-0.05, 0.1, 0.05), True),  # one is behind, but not all are: within the interval
        ((0.0, 0.0, 0.0), True),
        ((-0.005, -0.006, -0.007), True),  # what compression may cost
        ((-0.02, -0.03, -0.04), False),
    ],
)
def test_what_is_served_must_not_surely_be_behind_the_shared_adapter(
    gains: tuple[float, ...], passes: bool
) -> None:
    verdict = judge(*(beside(f"u{number}", gain) for number, gain in enumerate(gains)))
    assert verdict.passed is passes
    assert verdict.gain_over_shared == pytest.approx(sum(gains) / 3)
    for reason in verdict.reasons:
        assert reason.startswith("gate.min_mean_gain_over_shared: ")
        assert "-0.03 nats" in reason and "at least -0.01" in reason and "u2 (-0.0400)" in reason


def test_a_gain_over_the_shared_adapter_can_be_asked_for() -> None:
    losses = [beside("alice", 0.03), beside("bob", 0.05)]
    assert judge(*losses, options=replace(LENIENT, min_mean_gain_over_shared=0.04)).passed
    (reason,) = judge(*losses, options=replace(LENIENT, min_mean_gain_over_shared=0.06)).reasons
    assert "95 % interval 0.0300 to 0.05, at least 0.06; the worst is alice" in reason


def test_a_user_far_behind_the_shared_adapter_is_refused_by_name_where_the_examples_show_it() -> None:
    sure, unsure = beside("bob", -0.2), beside("bob", -0.2, noise=0.5)
    others = [beside("alice", 0.3), beside("cleo", 0.3)]
    verdict = judge(sure, *others)
    (reason,) = verdict.reasons
    assert reason.startswith("gate.max_loss_over_shared: ") and "at most 0.1" in reason
    assert "bob 0.2000 (surely 0.2)" in reason and "alice" not in reason
    assert (verdict.loss_over_shared_user, verdict.loss_over_shared) == ("bob", pytest.approx(0.2))
    assert judge(unsure, *others).passed
    assert judge(sure, *others, options=replace(LIMITS, max_loss_over_shared=0.21)).passed


def test_where_only_means_are_known_they_are_judged_as_they_are() -> None:
    losses = [replace(beside(name, gain), each=None) for name, gain in (("alice", 0.5), ("bob", -0.2))]
    (reason,) = judge(*losses).reasons
    assert "bob 0.2000" in reason
    alone = judge(losses[1], options=replace(LENIENT, min_mean_gain_over_shared=0.0))
    assert alone.gain_over_shared_high == pytest.approx(-0.2) and not alone.passed


def test_without_a_shared_adapter_there_is_no_such_rule() -> None:
    strict = replace(LENIENT, min_mean_gain_over_shared=10.0, max_loss_over_shared=0.0)
    verdict = judge(user("alice"), user("bob"), options=strict)
    assert verdict.passed
    assert (verdict.gain_over_shared, verdict.loss_over_shared, verdict.loss_over_shared_user) == (
        None,
        None,
        "",
    )


def test_a_shared_loss_that_is_not_finite_is_named_and_compared_with_nothing() -> None:
    verdict = judge(beside("alice", 0.1), replace(beside("bob", 0.1), shared=math.nan), options=LENIENT)
    assert [reason for reason in verdict.reasons if "bob shared loss nan" in reason] == list(verdict.reasons)
    assert verdict.gain_over_shared == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("served", "compressed", "passes"),
    [("shared", 2.72, True), ("shared", 2.95, False), ("base", 3.0, True)],
)
def test_each_user_is_judged_by_what_they_are_served(served: str, compressed: float, passes: bool) -> None:
    """The personal adapter of neither is any good, and neither is served it."""
    bob = UserLosses("bob", 16, 3.0, 3.9, compressed, shared=2.7, served=served)
    verdict = check([user("alice"), bob], {"alice": 0.2} | ({"bob": 0.1} if served != "base" else {}), LIMITS)
    kept = [reason for reason in verdict.reasons if "over_shared" not in reason]
    assert (not kept) is passes
    assert verdict.improved_share == 1.0


def test_a_user_served_a_shared_adapter_that_nobody_measured_is_refused() -> None:
    bob = UserLosses("bob", 16, 3.0, 2.5, 2.5, served="shared")
    (reason,) = judge(user("alice"), bob, options=LENIENT).reasons
    assert "bob (served the shared adapter, which has no loss)" in reason and "alice" not in reason


def test_users_served_the_base_model_are_not_asked_to_beat_it() -> None:
    bob = UserLosses("bob", 16, 3.0, 3.9, 3.0, shared=3.2, served="base")
    cleo = UserLosses("cleo", 16, 3.0, 2.9, 3.1, shared=3.2)
    verdict = check([user("alice"), bob, cleo], {"alice": 0.2, "cleo": 0.2}, LIMITS)
    assert verdict.improved_share == 0.5
    (reason,) = [one for one in verdict.reasons if one.startswith("gate.min_improved_users")]
    assert "cleo (3.1000, base 3.0000)" in reason and "bob" not in reason


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
