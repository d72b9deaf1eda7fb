"""What every policy of a router costs and gives up, on prompts it has not seen, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soppu.evaluate.intervals import Interval, interval
from soppu.serve.router.crossed import FOLDS, choices
from soppu.serve.router.measured import PERSONAL, Floats, Measured
from soppu.serve.router.policies import ORACLE, Options


def rows(measured: Measured, options: Options, *, folds: int = FOLDS, seed: int = 0) -> list[dict[str, Any]]:
    """One row a policy, the oracle's last.

    `quality` is nats a token, the mean over users (lower is better); `bytes` are what a request touches of
    its user's own numbers, in the mean. Regrets are differences of quality on the same prompts: 0 is as good.
    Their intervals draw whole users; those `over_prompts` draw prompts, each by its tokens.
    """
    chosen = choices(measured, options, count=folds, seed=seed)
    losses = {name: measured.losses[np.arange(len(measured)), arms] for name, arms in chosen.items()}
    bytes_of = np.array([arm.bytes for arm in options.arms])
    found = []
    for name, arms in chosen.items():
        shares = np.bincount(arms, minlength=len(options.arms)) / len(arms)
        found.append(
            {
                "policy": name,
                "quality": float(np.mean(_by_user(measured, losses[name]))),
                "bytes": float(bytes_of[arms].mean()),
                "arms": {arm.name: float(share) for arm, share in zip(options.arms, shares, strict=True)},
                **_regret(measured, losses[name] - losses[ORACLE], seed=seed, over="oracle"),
                **_regret(measured, losses[name] - losses[PERSONAL], seed=seed, over="personal"),
                "prompts": len(measured),
                "users": len(set(measured.asked.users)),
            }
        )
    return found


def verdict(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The policy to use, and why: always personal, unless one is better for sure, over users and prompts."""
    surely = [
        row
        for row in table
        if row["policy"] not in (ORACLE, PERSONAL)
        and all(row[name][1] is not None and row[name][1] < 0 for name in _AGAINST_PERSONAL)
    ]
    if not surely:
        return PERSONAL, "no policy is better than always personal for sure (95 %, over users and prompts)"
    best = min(surely, key=lambda row: float(row["quality"]))
    return str(best["policy"]), (
        f"{-best['regret_personal']:.4f} nats a token better than always personal, for sure (95 %)"
    )


_AGAINST_PERSONAL = ("interval_personal", "interval_personal_over_prompts")


def _by_user(measured: Measured, nats: Floats) -> Floats:
    """(users,) nats a token."""
    places = measured.of_users().values()
    return np.array([nats[own].sum() / measured.tokens[own].sum() for own in places])


def _regret(measured: Measured, more: Floats, *, seed: int, over: str) -> dict[str, Any]:
    """What is given up against another way, `more` nats at each prompt."""
    of_users = _by_user(measured, more)
    users = interval(of_users, np.ones(len(of_users)), seed=seed)
    prompts = interval(more, measured.tokens.astype(np.float64), seed=seed)
    name = "interval" if over == ORACLE else f"interval_{over}"
    return {f"regret_{over}": users.mean, name: _ends(users), f"{name}_over_prompts": _ends(prompts)}


def _ends(found: Interval) -> list[float | None]:
    return [found.low, found.high]
