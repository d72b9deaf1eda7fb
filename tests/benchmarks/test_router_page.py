"""The figures of docs/router.md are those of router.json, and its finding turns with them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from benchmarks import router_page
from benchmarks.pages import read_result, with_blocks
from soppu.serve.router.policies import FITTED, ORACLE

FIRST = ["policy", "quality", "cost", "regret_oracle", "interval"]
AGAINST = ("interval_personal", "interval_personal_over_prompts")


@pytest.fixture
def found() -> dict[str, Any]:
    return copy.deepcopy(read_result("router"))


def by_policy(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in found["rows"]}


def test_the_page_has_the_figures_of_the_result_file() -> None:
    text = router_page.PAGE.read_text()
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", text)) == set(router_page.MARKS)
    assert with_blocks(text, router_page.blocks()) == text, "run `python -m benchmarks.router_page`"


def test_the_result_is_of_enough_users_and_prompts_and_has_every_policy(found: dict[str, Any]) -> None:
    assert [row["policy"] for row in found["rows"]] == [*FITTED, ORACLE]
    for row in found["rows"]:
        assert set(FIRST) <= set(row)
        assert row["users"] >= 8 and row["prompts"] >= 200
        assert row["interval"][0] <= row["regret_oracle"] <= row["interval"][1]
    assert found["judged"]["folds"] > 1


def test_the_rows_follow_from_each_other(found: dict[str, Any]) -> None:
    rows, arms = by_policy(found), {arm["arm"]: arm for arm in found["arms"]}
    for row in rows.values():
        for over in ("personal", ORACLE):
            assert row[f"regret_{over}"] == pytest.approx(row["quality"] - rows[over]["quality"])
        of_arms = sum(share * arms[name]["seconds"] for name, share in row["arms"].items())
        assert row["cost"] == pytest.approx(row["deciding"] + of_arms)
        shares = sum(share * arms[name]["bytes"] for name, share in row["arms"].items())
        assert row["bytes"] == pytest.approx(shares)
    for name in arms:
        assert rows[name]["arms"][name] == 1  # always that one
    assert rows[ORACLE]["deciding"] == rows[ORACLE]["regret_oracle"] == 0


def test_a_policy_that_wins_or_loses_for_sure_is_named_and_nothing_else_is(found: dict[str, Any]) -> None:
    for name, row in by_policy(found).items():
        if name in FITTED:
            row |= dict.fromkeys(AGAINST, [-0.1, 0.1])
    assert "No policy that chooses is better" in (told := router_page.finding(found))
    assert "worse for sure" not in told and "off unless it is asked for, and this is why." in told
    by_policy(found)["gain"] |= {"regret_personal": -0.07} | dict.fromkeys(AGAINST, [-0.1, -0.05])
    by_policy(found)["length"] |= {"regret_personal": 0.3} | dict.fromkeys(AGAINST, [0.1, 0.5])
    by_policy(found)["neighbours"][AGAINST[0]] = [-0.1, -0.05]  # over users alone: prompts do not bear it out
    told = router_page.finding(found)
    assert "over users and prompts): `gain` (-0.0700); worse for sure: `length` (+0.3000)." in told
    assert "this is why" not in told


def test_what_saves_bytes_is_named_only_where_nothing_is_surely_lost_by_it(found: dict[str, Any]) -> None:
    rows = by_policy(found)
    for name in ("gain", "neighbours", "length", "likelihood"):
        rows[name] |= {"bytes": 5.0} | dict.fromkeys(AGAINST, [0.1, 0.2])
    assert "No policy touches fewer bytes without a sure loss." in router_page.finding(found)
    half = next(arm for arm in found["arms"] if arm["arm"] == "personal")["bytes"] / 2
    rows["gain"] |= {"bytes": half} | dict.fromkeys(AGAINST, [-0.1, 0.2])
    assert "without a sure loss: `gain` (50 %, " in router_page.finding(found)
    rows["gain"][AGAINST[1]] = [0.1, 0.2]  # a loss that is sure over prompts alone is one
    assert "No policy touches fewer" in router_page.finding(found)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([0.98, 1.2], "takes as long, as far as can be told (1.100 times"),
        ([1.05, 1.2], "takes 10.0 % longer (1.100 times the base model's seconds, [1.050, 1.200])"),
    ],
)
def test_a_difference_of_seconds_is_said_where_it_is_sure(
    found: dict[str, Any], ends: list[float], said: str
) -> None:
    next(arm for arm in found["arms"] if arm["arm"] == "personal").update(to_base=1.1, interval_to_base=ends)
    assert said in router_page.finding(found)


def test_of_one_user_nothing_is_for_sure_and_without_another_bundle_nothing_is_said_of_it(
    found: dict[str, Any],
) -> None:
    found["rows"] = [row for row in found["rows"] if row["policy"] != "cheaper"]
    for row in found["rows"]:
        row |= {"interval": [None, None], "interval_personal": [None, None]}
    told = router_page.finding(found)
    assert "No policy that chooses is better" in told and "cheaper" not in told
