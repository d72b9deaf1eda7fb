"""The table of a router's policies against plain loops, and where there is next to nothing to judge by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from soppu.errors import RouterError
from soppu.evaluate import intervals
from soppu.serve.router import crossed, policies
from soppu.serve.router.measured import Arm, Measured
from soppu.serve.router.policies import FITTED, ORACLE, Options
from soppu.stages import router_table
from tests.soppu.serve import routing

TWO = Options(routing.ARMS, neighbours=3)
THREE = replace(TWO, arms=(*routing.ARMS, Arm("cheaper", "{user}@1", 10.0)))
USERS = ("ann", "bob", "cleo")


def slow_choices(known: Measured, options: Options) -> dict[str, list[int]]:
    """Prompt by prompt: what is chosen by a policy that was fitted on the prompts of the other folds."""
    every = range(len(known))
    fold = crossed.folds(known.digests, count=5, seed=0)
    chosen: dict[str, list[int]] = {}
    for name in policies.names([arm.name for arm in options.arms]):
        chosen[name] = []
        for place in every:
            seen = np.array([other for other in every if fold[other] != fold[place]])
            expected = policies.fit(name, known.at(seen), options).expect(known.asked.at(np.array([place])))
            chosen[name].append(int(policies.choose(expected, options)[0]))
    arms = range(len(options.arms))
    return {**chosen, ORACLE: [min(arms, key=lambda arm, p=p: known.losses[p, arm]) for p in every]}


def slow_rows(known: Measured, options: Options) -> dict[str, dict[str, Any]]:
    every, chosen = range(len(known)), slow_choices(known, options)
    users = sorted(set(known.asked.users))
    found = {}
    for name, arms in chosen.items():
        row: dict[str, Any] = {
            "bytes": sum(options.arms[arm].bytes for arm in arms) / len(known),
            "arms": {arm.name: arms.count(place) / len(known) for place, arm in enumerate(options.arms)},
            "quality": mean_of(known, [known.losses[p, arms[p]] for p in every], users),
        }
        for over, key in ((ORACLE, "interval"), ("personal", "interval_personal")):
            more = [float(known.losses[p, arms[p]] - known.losses[p, chosen[over][p]]) for p in every]
            row[f"regret_{over}"] = mean_of(known, more, users)
            row[key] = slow_interval([mean_of(known, more, [user]) for user in users], [1.0] * len(users))
            row[f"{key}_over_prompts"] = slow_interval(more, known.tokens.tolist())
        found[name] = row
    return found


def mean_of(known: Measured, nats: list[float], users: list[str]) -> float:
    """Nats a token of every user, and of those the mean."""
    rates = []
    for user in users:
        own = [p for p, name in enumerate(known.asked.users) if name == user]
        rates.append(sum(nats[p] for p in own) / sum(int(known.tokens[p]) for p in own))
    return float(sum(rates) / len(rates))


def slow_interval(sums: list[float], weights: list[float]) -> list[float | None]:
    """Percentiles of means of units drawn with replacement."""
    n = len(sums)
    if n < 2:
        return [None, None]
    drawn = np.random.default_rng(0).integers(n, size=(intervals.DRAWS, n)).tolist()
    means = sorted(sum(sums[u] for u in units) / sum(weights[u] for u in units) for units in drawn)

    def at(share: float) -> float:
        low = int(share * (len(means) - 1))
        part = share * (len(means) - 1) - low
        return means[low] + part * (means[min(low + 1, len(means) - 1)] - means[low])

    tail = intervals._tail(n)
    return [at(tail), at(1 - tail)]


@pytest.mark.parametrize("options", [TWO, THREE], ids=["two arms", "three arms"])
def test_every_row_is_what_plain_loops_find(options: Options) -> None:
    known = routing.measured(30, users=USERS, arms=len(options.arms))
    found = {row["policy"]: row for row in router_table.rows(known, options)}
    expected = slow_rows(known, options)
    assert list(found) == list(expected)
    assert ("cheaper" in found) == (len(options.arms) == 3)
    for policy, row in expected.items():
        for name, value in row.items():
            assert found[policy][name] == pytest.approx(value, abs=1e-9), (policy, name)
        assert (found[policy]["prompts"], found[policy]["users"]) == (30, 3)


def test_the_oracle_gives_nothing_up_and_nobody_is_below_it() -> None:
    rows = router_table.rows(routing.measured(40, users=USERS, arms=3), THREE)
    assert rows[-1]["policy"] == ORACLE
    assert rows[-1]["regret_oracle"] == 0 and rows[-1]["interval"] == [0, 0]
    for row in rows:
        assert row["regret_oracle"] == pytest.approx(row["quality"] - rows[-1]["quality"])
        assert row["regret_oracle"] >= 0
        assert sum(row["arms"].values()) == pytest.approx(1)
    of = {row["policy"]: row for row in rows}
    assert of["personal"]["regret_personal"] == 0 and of["personal"]["interval_personal"] == [0, 0]
    assert (of["base"]["bytes"], of["personal"]["bytes"], of["cheaper"]["bytes"]) == (0, 100, 10)


def test_where_all_arms_are_alike_the_cheapest_is_taken_and_nothing_given_up() -> None:
    known = routing.measured(20, users=USERS)
    losses, reading = (np.repeat(one[:, :1], 2, axis=1) for one in (known.losses, known.asked.reading))
    rows = router_table.rows(replace(known, losses=losses, asked=replace(known.asked, reading=reading)), TWO)
    for row in rows:
        assert (row["regret_oracle"], row["regret_personal"]) == (0, 0)
        assert row["arms"]["base"] == (row["policy"] != "personal")
    assert router_table.verdict(rows)[0] == "personal"  # nothing is better for sure


def test_of_one_user_there_is_no_interval_over_users_and_so_no_verdict_against_personal() -> None:
    known = routing.measured(30, users=("ann",))
    worse = replace(known, losses=known.losses + np.array([0.0, 9.0]) * known.tokens[:, None])
    rows = router_table.rows(worse, TWO)
    base = next(row for row in rows if row["policy"] == "base")
    assert base["interval_personal"] == [None, None] and base["interval_personal_over_prompts"][1] < 0
    assert router_table.verdict(rows)[0] == "personal"
    several = replace(worse, asked=replace(known.asked, users=[USERS[n % 3] for n in range(30)]))
    policy, why = router_table.verdict(router_table.rows(several, TWO))
    assert policy != "personal" and "nats a token better than always personal, for sure (95 %)" in why


@pytest.mark.parametrize("count", [1, 12])
def test_one_prompt_however_often_asked_is_nothing_to_judge_by(count: int) -> None:
    same = replace(routing.measured(count, users=USERS), digests=["a" * 64] * count)
    with pytest.raises(RouterError, match=f"{count} prompts, of them different: 1, needed: 2 and more"):
        router_table.rows(same, TWO)


def test_of_two_prompts_each_is_judged_by_the_other_whatever_the_seed() -> None:
    known = replace(routing.measured(2, users=("ann", "bob")), digests=["a" * 64, "b" * 64])
    other = known.losses[::-1] / known.tokens[::-1, None]
    for seed in range(8):
        rows = router_table.rows(known, TWO, seed=seed)
        gain = next(row for row in rows if row["policy"] == "gain")
        assert gain["arms"]["personal"] == policies.choose(other, TWO).mean()


def test_every_policy_is_known_by_name_and_the_cheaper_one_where_its_arm_is() -> None:
    assert policies.names(["base", "personal", "cheaper"]) == tuple(FITTED)
    with pytest.raises(RouterError, match="router policy 'cheaper', allowed: personal, base, gain"):
        policies.fit("cheaper", routing.measured(), TWO)
