"""From what was measured of every arm to the figures of tradeoff.json: means, intervals, what is left out.

Pure: the same measurements give the same figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from soppu.evaluate.intervals import interval
from soppu.evaluate.losses import ExampleLosses
from soppu.evaluate.tradeoff.schema import LOWER_IS_BETTER
from soppu.evaluate.tradeoff.texts import ABOUT_ZERO, TEXT_METRICS, Said, score
from soppu.tradeoff_settings import BASE, METRICS

Scores = dict[
    str, dict[str, dict[str, float]]
]  # metric -> arm -> user -> value; of pass_at_1 problem -> value


@dataclass(frozen=True)
class Measured:
    """One arm, as it was measured.

    Attributes:
        about: name, kind, method, target, bundle_id, bytes, bytes_per_user, relative_error of the file.
        sizes: user -> bytes of theirs.
        said: user -> their texts; empty where no text was generated.
        latency_ms, first_ms: user -> milliseconds of each prompt asked alone.
        solved: problem of HumanEval -> whether the arm solved it; empty where none was asked.
    """

    about: Mapping[str, Any]
    sizes: Mapping[str, float] = field(default_factory=dict)
    said: Mapping[str, Sequence[Said]] = field(default_factory=dict)
    latency_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    first_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tokens_s: float | None = None
    memory_bytes: int | None = None
    solved: Mapping[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The arm's."""
        return str(self.about["name"])


def scores(
    arms: Sequence[Measured], losses: Mapping[str, ExampleLosses], *, metrics: Iterable[str]
) -> Scores:
    """Every metric of every user with every arm. MissingExtra for a metric whose library is not there."""
    found: Scores = {}
    for metric in metrics:
        if metric == "loss":
            found[metric] = {
                arm.name: {user: each.mean(arm.name) for user, each in losses.items()} for arm in arms
            }
        elif metric in TEXT_METRICS:
            found[metric] = {
                arm.name: {user: score(metric, said) for user, said in arm.said.items()} for arm in arms
            }
        elif metric == "pass_at_1":
            found[metric] = {
                arm.name: {problem: float(one) for problem, one in arm.solved.items()} for arm in arms
            }
    return found


def about_zero(found: Scores) -> dict[str, str]:
    """Metric -> why it tells nothing here, of those in which no arm scores more than about nothing."""
    why = {}
    for metric, limit in ABOUT_ZERO.items():
        means = {arm: fmean(users.values()) for arm, users in found.get(metric, {}).items() if users}
        best = max(means, key=means.__getitem__, default="")
        if best and means[best] < limit:
            why[metric] = f"about zero for every arm: the best, {best}, has {means[best]:.3g}"
    return why


def arms_of(arms: Sequence[Measured], found: Scores, *, seed: int) -> list[dict[str, Any]]:
    """The arms of the file, in order: means over users, and intervals over users of what is won over base."""
    return [
        {
            **arm.about,
            **{metric: _mean(found.get(metric, {}).get(arm.name, {})) for metric in METRICS},
            **_latencies([one for times in arm.latency_ms.values() for one in times]),
            "first_token_ms_p50": _percentile([one for times in arm.first_ms.values() for one in times], 50),
            "tokens_s": arm.tokens_s,
            "memory_bytes": arm.memory_bytes,
            "intervals": {} if arm.name == BASE else _over_users(found, arm.name, seed=seed),
        }
        for arm in arms
    ]


def rows_of(
    arms: Sequence[Measured], found: Scores, losses: Mapping[str, ExampleLosses], *, seed: int
) -> list[dict[str, Any]]:
    """The rows of the file: every user with every arm, and what it wins in loss over their examples."""
    return [
        {
            "user": user,
            "arm": arm.name,
            **{
                metric: found.get(metric, {}).get(arm.name, {}).get(user)
                for metric in ("loss", *TEXT_METRICS)
            },
            **_latencies(arm.latency_ms.get(user, ())),
            "bytes": arm.sizes.get(user, 0.0),
            "interval": _over_examples(each, arm.name, seed=seed) if "loss" in found else None,
        }
        for user, each in losses.items()
        for arm in arms
    ]


def _mean(users: Mapping[str, float]) -> float | None:
    return fmean(users.values()) if users else None


def _latencies(milliseconds: Sequence[float]) -> dict[str, float | None]:
    return {f"latency_ms_p{share}": _percentile(milliseconds, share) for share in (50, 99)}


def _percentile(values: Sequence[float], share: int) -> float | None:
    return float(np.percentile(values, share)) if len(values) else None


def _over_users(found: Scores, name: str, *, seed: int) -> dict[str, Any]:
    """Metric -> what the arm wins over the base model, above 0 is better, drawing users; or problems."""
    won = {}
    for metric, arms in found.items():
        base, own = arms.get(BASE, {}), arms.get(name, {})
        if users := sorted(base.keys() & own.keys()):
            sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
            gains = np.array([sign * (own[user] - base[user]) for user in users])
            drawn = interval(gains, np.ones_like(gains), seed=seed)
            won[metric] = {"over": BASE, "mean": drawn.mean, "low": drawn.low, "high": drawn.high}
    return won


def _over_examples(each: ExampleLosses, name: str, *, seed: int) -> dict[str, Any] | None:
    """The same of one user's loss, drawing examples."""
    tokens = np.array(each.tokens, dtype=float)
    counted = tokens > 0
    if name == BASE or not counted.any():
        return None
    gains = np.array(each.sums[BASE]) - np.array(each.sums[name])
    drawn = interval(gains[counted], tokens[counted], seed=seed)
    return {"metric": "loss", "over": BASE, "mean": drawn.mean, "low": drawn.low, "high": drawn.high}
