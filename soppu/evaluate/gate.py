"""The gate: whether a bundle may be published, judged from losses and reconstruction errors.

It only judges; measuring is done in `soppu.evaluate.losses` and `soppu.compress.numbers.errors`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import InstanceOf

from soppu.config import GateConfig
from soppu.errors import GateError
from soppu.evaluate.gains import Gain, by_user, means, over_users
from soppu.evaluate.intervals import Interval
from soppu.evaluate.losses import COLUMNS, TOLERANCE, UserLosses
from soppu.federation.personalise import BASE, SHARED
from soppu.settings import Flag, Real, allowed

Text = Annotated[InstanceOf[str], allowed("a text")]  # a name with a lone surrogate is one, too

_NAMED = 10  # users spelt out in one reason; the rest is counted


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, and the figures it decided on."""

    passed: Flag  # whether the bundle may be published
    reasons: tuple[Text, ...]  # one line for each broken rule; empty when passed
    # gain after compression / before it, both summed over the users for whom what was chosen beats the base
    # model; 0 where there is no such user
    mean_gain_kept: Real
    worst_user: Text  # who keeps the least of a gain above `TOLERANCE`; "" if nobody gained that much
    worst_gain_kept: Real  # what that user keeps; 0 without such a user
    improved_share: (
        Real  # of the users measured with an adapter, those for whom what is served beats the base model
    )
    max_relative_error: Real  # largest relative error of one user's adapter
    worst_error_user: Text  # whose that is
    # of what is served, over the shared adapter, nats a token; None where nothing shared was measured
    gain_over_shared: Real | None  # the mean over users
    gain_over_shared_high: Real | None  # upper end of its interval: what is held against the limit
    loss_over_shared: (
        Real | None
    )  # what a user loses at least, given how few the examples are; the most of any user
    loss_over_shared_user: Text  # whose that is
    unmeasured: tuple[Text, ...]  # users of the bundle without a held-out loss: judged by their error alone
    limits: dict[Text, Real]  # the rules as configured, config key -> value

    def raise_if_refused(self) -> None:
        """Raise GateError with every reason, unless the bundle passed."""
        if not self.passed:
            raise GateError(list(self.reasons))

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values; every number is finite."""
        return dataclasses.asdict(self) | {
            "reasons": list(self.reasons),
            "unmeasured": list(self.unmeasured),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`. Raises KeyError naming a missing field."""
        known = {item.name: value[item.name] for item in dataclasses.fields(cls)}
        known |= {name: tuple(known[name]) for name in ("reasons", "unmeasured")}
        return cls(**known)


def check(
    losses: Sequence[UserLosses], relative_error: Mapping[str, float], options: GateConfig, *, seed: int = 0
) -> Verdict:
    """Judge a bundle.

    All is about what users are served: their own adapter, the shared one, or the base model, whose users
    have nothing that compression could take. The shared adapter is compared with where it was measured; the
    limits on that are broken only where the intervals say so, since a few examples tell no more.

    A user whose gain is at most `TOLERANCE` (or negative) has nothing whose kept share could be told
    from noise. Such a user breaks `gate.min_user_gain_kept` where the compressed loss is worse than the base
    model's by more than `TOLERANCE`.

    A user without a loss is judged by the relative error alone and listed as unmeasured. Losses of nobody, a
    loss without a relative error, and any number that is not finite are refused whatever the limits are.

    Args:
        losses: what was measured, one entry a user.
        relative_error: user -> relative error of the compressed adapter, for everybody in the bundle.
        options: the limits.
        seed: of the draws for intervals.
    """
    finite = [one for one in losses if all(map(math.isfinite, (one.base, one.chosen, one.compressed)))]
    changed = [one for one in losses if one.served != BASE]
    errors = {user: value for user, value in relative_error.items() if math.isfinite(value)}
    worst_error = max(errors, key=errors.__getitem__, default="")
    measured = {one.user for one in losses}
    over_shared = by_user(losses, "compressed", over="shared", seed=seed)
    mean = over_users(means(losses, "compressed", over="shared"), seed=seed)
    figures = Verdict(
        passed=False,
        reasons=(),
        **_kept(finite),
        improved_share=sum(map(_improves, changed)) / len(changed) if changed else float(bool(losses)),
        max_relative_error=errors.get(worst_error, 0.0),
        worst_error_user=worst_error,
        **_beside_shared(over_shared, mean),
        unmeasured=tuple(user for user in relative_error if user not in measured),
        limits={name: value for name, value in vars(options).items() if isinstance(value, float)},
    )
    found = (
        _not_measured(losses, relative_error),
        _listed("not finite", _not_finite(losses, relative_error)),
        _total(figures, options) if finite else "",
        _each(finite, options.min_user_gain_kept),
        _error(errors, options.max_relative_error),
        _improved(changed, figures, options),
        _mean_over_shared(mean, options.min_mean_gain_over_shared),
        _each_over_shared(over_shared, options.max_loss_over_shared),
    )
    reasons = tuple(filter(None, found))
    return dataclasses.replace(figures, passed=not reasons, reasons=reasons)


def _kept(finite: Sequence[UserLosses]) -> dict[str, Any]:
    """What is left of the gains after compression, of all users and of the one who keeps least."""
    improved = [one for one in finite if one.gain > 0]
    gained = math.fsum(one.gain for one in improved)
    kept = math.fsum(one.base - one.compressed for one in improved)
    sizeable = {one.user: one.gain_kept for one in improved if one.gain > TOLERANCE}
    worst = min(sizeable, key=sizeable.__getitem__, default="")
    return {
        "mean_gain_kept": kept / gained if gained else 0.0,
        "worst_user": worst,
        "worst_gain_kept": sizeable.get(worst, 0.0),
    }


def _beside_shared(gains: Mapping[str, Interval], mean: Gain | None) -> dict[str, Any]:
    surely = {user: -_upper(gain) for user, gain in gains.items()}
    behind = max(surely, key=surely.__getitem__, default="")
    return {
        "gain_over_shared": mean.mean if mean else None,
        "gain_over_shared_high": _upper(mean) if mean else None,
        "loss_over_shared": surely.get(behind),
        "loss_over_shared_user": behind,
    }


def _not_measured(losses: Sequence[UserLosses], relative_error: Mapping[str, float]) -> str:
    if not losses:
        return "no user's held-out loss was measured"
    faults = [f"{one.user} (no held-out examples)" for one in losses if one.examples < 1]
    inside = [one.user for one in losses if one.served != BASE]
    faults += [f"{user} (no relative error)" for user in inside if user not in relative_error]
    blind = [one.user for one in losses if one.served == SHARED and one.shared is None]
    faults += [f"{user} (served the shared adapter, which has no loss)" for user in blind]
    return _listed("not measured", faults)


def _not_finite(losses: Sequence[UserLosses], relative_error: Mapping[str, float]) -> list[str]:
    figures = [
        (f"{one.user} {name} loss", getattr(one, name))
        for one in losses
        for name in COLUMNS
        if getattr(one, name) is not None
    ]
    figures += [(f"{user} relative error", value) for user, value in relative_error.items()]
    return [f"{name} {value}" for name, value in figures if not math.isfinite(value)]


def _total(figures: Verdict, options: GateConfig) -> str:
    value, limit = figures.mean_gain_kept, options.min_mean_gain_kept
    if value >= limit:
        return ""
    whose = f"; the worst is {figures.worst_user}" if figures.worst_user else ""
    return (
        f"gate.min_mean_gain_kept: {_shown(value, limit)} of all users' gain is kept, at least {limit}{whose}"
    )


def _each(finite: Sequence[UserLosses], limit: float) -> str:
    faults = []
    for one in sorted(finite, key=lambda one: one.gain_kept):
        if one.gain > TOLERANCE:
            if one.gain_kept < limit:
                faults.append(f"{one.user} keeps {_shown(one.gain_kept, limit)}")
        elif one.compressed > one.base + TOLERANCE:
            faults.append(
                f"{one.user} had no gain and goes from {one.base:.4f} to {one.compressed:.4f} nats a token,"
                f" more than {TOLERANCE} above the base model"
            )
    return _listed(f"gate.min_user_gain_kept: at least {limit} of every user's gain", faults)


def _error(errors: Mapping[str, float], limit: float) -> str:
    over = sorted((user for user in errors if errors[user] > limit), key=lambda user: -errors[user])
    faults = [f"{user} {_shown(errors[user], limit)}" for user in over]
    return _listed(f"gate.max_relative_error: relative error at most {limit}", faults)


def _improves(one: UserLosses) -> bool:
    return one.compressed < one.base


def _improved(changed: Sequence[UserLosses], figures: Verdict, options: GateConfig) -> str:
    share, limit = figures.improved_share, options.min_improved_users
    if not changed or share >= limit:
        return ""
    behind = [one for one in changed if not _improves(one)]
    return _listed(
        f"gate.min_improved_users: what is served beats the base model for {_shown(share, limit)} of"
        f" the users, at least {limit}; not for",
        [f"{one.user} ({one.compressed:.4f}, base {one.base:.4f})" for one in behind],
    )


def _upper(gain: Gain | Interval) -> float:
    """The most that a gain may be; itself where it has no interval."""
    return gain.mean if gain.high is None else gain.high


def _mean_over_shared(mean: Gain | None, limit: float) -> str:
    if mean is None or _upper(mean) >= limit:
        return ""
    within = "" if mean.high is None else f", 95 % interval {mean.low:.4f} to {_shown(mean.high, limit)}"
    return (
        f"gate.min_mean_gain_over_shared: what is served gains {_shown(mean.mean, limit)} nats a token over"
        f" the shared adapter on the mean{within}, at least {limit}; the worst is {mean.worst_user}"
        f" ({mean.worst:.4f})"
    )


def _each_over_shared(gains: Mapping[str, Interval], limit: float) -> str:
    over = sorted((user for user in gains if -_upper(gains[user]) > limit), key=lambda user: gains[user].mean)
    return _listed(
        f"gate.max_loss_over_shared: served worse than the shared adapter by at most {limit} nats a token",
        [f"{user} {-gains[user].mean:.4f} (surely {_shown(-_upper(gains[user]), limit)})" for user in over],
    )


def _listed(rule: str, faults: Sequence[str]) -> str:
    """The reason with its first faults spelt out and the rest counted; "" without any."""
    rest = len(faults) - _NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{rule}: {', '.join(faults[:_NAMED])}{more}" if faults else ""


def _shown(value: float, limit: float) -> str:
    """As few digits as tell the value from the limit."""
    texts = (f"{value:.{digits}g}" for digits in (3, 6, 9))
    return next((text for text in texts if float(text) != limit), repr(value))
