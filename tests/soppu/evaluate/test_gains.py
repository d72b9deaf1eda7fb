"""What is won over what: for each user and all of them, in pairs, whatever was not measured left out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from soppu.evaluate import gains
from soppu.evaluate.intervals import Interval
from soppu.evaluate.losses import COLUMNS, ExampleLosses, UserLosses
from tests.soppu.evaluate.example import make_losses

USERS = [f"u{number}" for number in range(9)]


def test_a_users_interval_is_over_examples_and_a_means_over_users() -> None:
    losses = make_losses(USERS)
    found = gains.by_user(losses, "compressed", over="shared", seed=0)
    for one in losses:
        gain = found[one.user]
        assert one.shared is not None and gain.mean == pytest.approx(one.shared - one.compressed)
        assert gain.low is not None and gain.high is not None and gain.low < gain.mean < gain.high
        assert gain.high - gain.low < 0.2  # the examples of one user differ by 0.5 from each other
    mean = gains.over_users(gains.means(losses, "compressed", over="shared"), seed=0)
    assert mean and mean.low and mean.high and mean.low < mean.mean < mean.high
    assert mean.mean == pytest.approx(sum(gain.mean for gain in found.values()) / len(USERS))
    assert (mean.better, mean.users) == (9, 9)
    assert mean.worst == pytest.approx(found[mean.worst_user].mean)
    assert mean.worst == pytest.approx(min(gain.mean for gain in found.values()))


def test_order_does_not_matter_and_the_seed_does() -> None:
    losses = make_losses(USERS)
    assert gains.told(losses, seed=0) == gains.told(losses[::-1], seed=0) != gains.told(losses, seed=1)


def test_what_was_not_measured_is_left_out() -> None:
    losses = make_losses(USERS[:4])
    losses[0] = replace(losses[0], shared=None)
    losses[1] = replace(losses[1], shared=math.nan)
    losses[2] = replace(losses[2], each=None)
    found = gains.by_user(losses, "personal", over="shared", seed=0)
    assert list(found) == ["u2", "u3"]
    assert losses[2].shared is not None
    assert found["u2"] == Interval(losses[2].shared - losses[2].personal)
    assert gains.told([], seed=0) == dict.fromkeys(("over_base", "over_shared", "personal_over_shared"))


def test_examples_without_a_token_count_for_nothing() -> None:
    (whole,) = make_losses(["u"])
    assert whole.each
    more = ExampleLosses((*whole.each.tokens, 0), {k: (*v, 0.0) for k, v in whole.each.sums.items()})
    pair = [
        gains.by_user([replace(whole, each=each)], "personal", over="base", seed=0)
        for each in (whole.each, more)
    ]
    assert pair[0] == pair[1]


def test_losses_survive_json() -> None:
    """Packed to seven digits: the intervals of what was read are those of what was measured."""
    (whole,) = make_losses(["u"])
    text = json.dumps(whole.to_dict(), indent=2)
    assert text.count("\n") < 25  # a line a column, not one a number
    again = UserLosses.from_dict(json.loads(text))
    assert replace(again, each=None) == replace(whole, each=None)
    assert again.each and whole.each and again.each.tokens == whole.each.tokens
    for name in COLUMNS:
        assert again.each.sums[name] == pytest.approx(whole.each.sums[name], rel=1e-6)
    bare = replace(whole, each=None)
    assert UserLosses.from_dict(bare.to_dict()) == bare


@pytest.mark.parametrize(
    ("served", "shared", "compressed", "lost"),
    [
        ("personal", 2.0, 1.9, False),
        ("personal", 2.0, 2.0, False),
        ("personal", 2.0, 2.001, True),
        ("shared", 2.0, 2.009, False),  # its own compressed form: never better
        ("shared", 2.0, 2.02, True),
        ("base", 2.0, 2.5, None),
        ("personal", None, None, None),
    ],
)
def test_compression_has_lost_where_the_shared_adapter_would_do_better(
    served: str, shared: float | None, compressed: float | None, lost: bool | None
) -> None:
    one = UserLosses("u", 4, 3.0, 2.0, 2.0, 2.5, served)
    told = replace(one, validation_shared=shared, validation_compressed=compressed)
    assert told.compression_lost is lost
