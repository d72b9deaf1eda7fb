"""What one column of losses wins over another: for every user, and on the mean over users."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from soppu.evaluate.intervals import Interval, interval
from soppu.evaluate.losses import UserLosses


@dataclass(frozen=True)
class Gain:
    """Over all users measured, nats a token; above 0 is better.

    Attributes:
        mean, low, high: of users' gains, every user weighing the same, with its 95 % interval.
        better, users: for how many users it is above 0, of how many.
        worst, worst_user: the least of them, and whose it is.
    """

    mean: float
    low: float | None
    high: float | None
    better: int
    users: int
    worst: float
    worst_user: str


def means(losses: Sequence[UserLosses], of: str, *, over: str) -> dict[str, float]:
    """User -> what column `of` wins over column `over`, in the order of names.

    Users for whom one of the two was not measured, or is not finite, are left out.
    """
    pairs = {one.user: (getattr(one, over), getattr(one, of)) for one in losses}
    known = {user: pair[0] - pair[1] for user, pair in sorted(pairs.items()) if None not in pair}
    return {user: gain for user, gain in known.items() if math.isfinite(gain)}


def by_user(losses: Sequence[UserLosses], of: str, *, over: str, seed: int) -> dict[str, Interval]:
    """The same with an interval over each user's examples, which has no ends where only means are known.

    Cost: O(examples) a user, times the draws: about a millisecond.
    """
    measured = {one.user: one for one in losses}
    return {
        user: _paired(measured[user], of, over=over, seed=seed) or Interval(gain)
        for user, gain in means(losses, of, over=over).items()
    }


def over_users(gains: Mapping[str, float], *, seed: int) -> Gain | None:
    """The mean of users' gains with an interval over users; None where nobody has one."""
    if not gains:
        return None
    worst = min(gains, key=gains.__getitem__)
    values = np.array(list(gains.values()))
    drawn = interval(values, np.ones_like(values), seed=seed)
    better = sum(value > 0 for value in gains.values())
    # summed exactly: an equal gain of all users has to be their mean to the last bit
    return Gain(fmean(gains.values()), drawn.low, drawn.high, better, len(gains), gains[worst], worst)


def told(losses: Sequence[UserLosses], *, seed: int) -> dict[str, Any]:
    """What the report says of all users: three comparisons, None where there was nothing to compare."""
    pairs = {
        "over_base": ("compressed", "base"),
        "over_shared": ("compressed", "shared"),
        "personal_over_shared": ("personal", "shared"),
    }
    found = {name: over_users(means(losses, of, over=over), seed=seed) for name, (of, over) in pairs.items()}
    return {name: gain and asdict(gain) for name, gain in found.items()}


def _paired(one: UserLosses, of: str, *, over: str, seed: int) -> Interval | None:
    if one.each is None or not {of, over} <= one.each.sums.keys():
        return None
    tokens = np.array(one.each.tokens, dtype=float)
    difference = np.array(one.each.sums[over]) - np.array(one.each.sums[of])
    counted = tokens > 0
    if not counted.any() or not np.isfinite(difference).all():
        return None
    return interval(difference[counted], tokens[counted], seed=seed)
