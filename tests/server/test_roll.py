"""Who takes part in a federation: nobody is lost in silence, and nobody counts for more than they said."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from server.roll import Roll
from soppu.errors import FederationError
from tests.server.grid import InProcessGrid

pytestmark = pytest.mark.usefixtures("flower_identity")

PLAN = "p" * 64


class Nodes(InProcessGrid):
    """Nodes whose answers to hello are written down: a record, an exception, or None for silence.

    Args:
        answers: node -> its answers in the order of the questions; the last one holds for all that follow.
        late: node -> how many times its id must have been asked for before it is there.
    """

    def __init__(self, answers: dict[int, list[Any]], *, late: dict[int, int] | None = None) -> None:
        super().__init__([])
        self.answers = {node: list(said) for node, said in answers.items()}
        self.late = dict(late or {})

    def get_node_ids(self) -> Iterable[int]:
        self.late = {node: count - 1 for node, count in self.late.items()}
        return [node for node in self.answers if self.late.get(node, 0) < 0 or node not in self.late]

    def _answer(self, message: Message) -> Message | None:
        self.sent.append(message)
        said = self.answers[message.metadata.dst_node_id]
        now = said.pop(0) if len(said) > 1 else said[0]
        if isinstance(now, Exception):
            return Message(Error(code=1, reason=str(now)), reply_to=message)
        if now is None:
            return None
        content = now if isinstance(now, RecordDict) else RecordDict({"hello": ConfigRecord(now)})
        return Message(content, reply_to=message)


def says(user: str, **changes: Any) -> dict[str, Any]:
    return {"user": user, "plan-hash": PLAN, "examples": 10, **changes}


def roll(grid: Nodes, users: list[str], **more: Any) -> Roll:
    return Roll(grid, ConfigRecord({}), plan_hash=PLAN, users=users, most_examples=64, **more)


def test_a_node_that_fails_once_or_is_silent_once_is_asked_again() -> None:
    grid = Nodes({1: [says("ann")], 2: [RuntimeError("loading"), says("bob")], 3: [None, says("cleo")]})
    asked = roll(grid, ["ann", "bob", "cleo"])
    asked.gather(limit=5)
    asked.check(0)
    assert asked.nodes == {1: "ann", 2: "bob", 3: "cleo"}
    assert not asked.missing()
    assert [m.metadata.dst_node_id for m in grid.of_type("query.hello")] == [1, 2, 3, 2, 3]


def test_a_node_that_comes_late_is_waited_for() -> None:
    asked = roll(Nodes({1: [says("ann")], 2: [says("bob")]}, late={2: 2}), ["ann", "bob"])
    asked.gather(limit=10)
    assert asked.nodes == {1: "ann", 2: "bob"}


def test_who_was_missing_at_hello_joins_before_a_later_round() -> None:
    grid = Nodes({1: [says("ann")], 2: [None, None, None, says("bob")]})
    asked = roll(grid, ["ann", "bob"])
    asked.gather(limit=2)
    asked.check(1)
    assert asked.absent() == ["bob"]
    assert asked.missing() == {"bob": "no node says it is this user", "node 2": "no answer"}
    asked.ask_again(limit=1)
    assert asked.nodes == {1: "ann", 2: "bob"} and not asked.missing()
    asked.ask_again(limit=1)
    assert len(grid.of_type("query.hello")) == 5  # everybody is there: nobody is asked any more


def test_no_minimum_wants_everybody_and_names_who_is_missing() -> None:
    asked = roll(Nodes({1: [says("ann")], 2: [RuntimeError("disk is full")]}), ["ann", "bob", "cleo"])
    asked.gather(limit=1)
    with pytest.raises(FederationError) as caught:
        asked.check(0)
    told = str(caught.value)
    assert "1 users can train, federation.min_users is 0, which wants everybody" in told
    assert "2 of 3 nodes came within 1 s" in told
    assert "bob: no node" in told and "cleo: no node" in told and "node 2: disk is full" in told
    asked.check(1)  # who says that one is enough gets one
    with pytest.raises(FederationError, match="federation.min_users is 2"):
        asked.check(2)


@pytest.mark.parametrize("examples", [0, -3, 65, 10**12, True, 2.5, "10", None])
def test_a_user_cannot_say_to_have_more_examples_than_the_run_uses(examples: Any) -> None:
    answer = says("bob") | ({} if examples is None else {"examples": examples})
    if examples is None:
        del answer["examples"]
    asked = roll(Nodes({1: [says("ann")], 2: [answer]}), ["ann", "bob"])
    asked.gather(limit=1)
    assert asked.nodes == {1: "ann"} and asked.examples == {"ann": 10}
    assert "from 1 to data.train_examples = 64" in asked.refused["bob"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (says("zoe"), "says it is user 'zoe', who is not among those expected"),
        (says("b/../b"), "user id 'b/../b' is not valid"),
        (says("bob", **{"plan-hash": "q" * 64}), "holds another layer plan"),
        ({"plan-hash": PLAN, "examples": 10}, "user id '' is not valid"),
    ],
)
def test_who_cannot_take_part_is_refused_once_with_the_reason(answer: dict[str, Any], why: str) -> None:
    grid = Nodes({1: [says("ann")], 2: [answer]})
    asked = roll(grid, ["ann", "bob"])
    asked.gather(limit=1)
    asked.ask_again(limit=1)
    assert asked.nodes == {1: "ann"}
    assert why in " ".join(asked.refused.values())
    assert [m.metadata.dst_node_id for m in grid.of_type("query.hello")].count(2) == 1


# ---- who a node is


def test_where_nothing_says_who_a_node_is_two_of_one_name_are_both_refused() -> None:
    asked = roll(Nodes({1: [says("ann")], 2: [says("ann")], 3: [says("bob")]}), ["ann", "bob", "cleo"])
    asked.gather(limit=1)
    assert asked.nodes == {3: "bob"} and asked.examples == {"bob": 10}
    twice = "says it is user 'ann', and so does another node"
    assert asked.refused == {"node 1": twice, "node 2": twice}


def test_one_who_comes_later_under_a_name_that_is_taken_ends_both() -> None:
    grid = Nodes({1: [says("ann")], 3: [says("bob")], 2: [None, None, None, says("ann")]})
    asked = roll(grid, ["ann", "bob", "cleo"])
    asked.gather(limit=2)
    assert asked.nodes == {1: "ann", 3: "bob"}
    asked.ask_again(limit=1)
    assert asked.nodes == {3: "bob"}
    assert asked.refused.keys() == {"node 1", "node 2"}


def test_a_user_whose_node_went_and_came_back_as_another_keeps_their_place() -> None:
    grid = Nodes({1: [says("ann")]})
    asked = roll(grid, ["ann", "bob"])
    asked.gather(limit=1)
    grid.answers = {5: [says("ann", examples=7)]}
    asked.ask_again(limit=1)
    assert asked.nodes == {5: "ann"} and asked.examples == {"ann": 7} and not asked.refused


def test_a_registered_node_is_who_it_was_registered_for_whoever_answers_first() -> None:
    members = {1: "mallory", 2: "ann", 3: "bob"}
    grid = Nodes({1: [says("ann")], 2: [says("ann")], 3: [says("bob")], 4: [says("cleo")]})
    asked = roll(grid, ["ann", "bob"], members=members)
    asked.gather(limit=1)
    assert asked.nodes == {2: "ann", 3: "bob"}
    assert asked.refused["mallory"] == "says it is user 'ann', its node is 'mallory'"
    assert "members are others" in asked.refused["node 4"]
    assert {m.metadata.dst_node_id for m in grid.of_type("query.hello")} == {1, 2, 3}
    asked.check(0)


@pytest.mark.parametrize("other", [{"plan-hash": "q" * 64}, {"examples": 10**9}])
def test_what_an_impostor_says_is_held_against_nobody_else(other: dict[str, Any]) -> None:
    """Nor is the name it claims in the list of the refused: ann is there, and takes part."""
    asked = roll(Nodes({1: [says("ann", **other)], 2: [says("ann")]}), ["ann"], members={1: "bob", 2: "ann"})
    asked.gather(limit=1)
    assert asked.nodes == {2: "ann"} and asked.refused.keys() == {"bob"}


def test_simulated_nodes_are_told_who_they_are_each_another_user() -> None:
    class Told(Nodes):
        def _answer(self, message: Message) -> Message | None:
            self.answers[message.metadata.dst_node_id] = [says(str(message.content["config"]["user"]))]
            return super()._answer(message)

    grid = Told({7: [None], 9: [None], 8: [None], 11: [None]})
    asked = roll(grid, ["bob", "ann", "cleo"], simulated=True)
    asked.gather(limit=1)
    assert asked.nodes == {7: "bob", 8: "ann", 9: "cleo"}
    assert asked.refused.keys() == {"node 11"}


# ---- answers that are none

HUGE = "x" * 5_000_000
MALFORMED: dict[str, tuple[Any, str]] = {
    "empty": (RecordDict({}), "is not one record `hello`"),
    "another record": (RecordDict({"hi": ConfigRecord(says("bob"))}), "is not one record"),
    "an array": (RecordDict({"hello": ArrayRecord([np.zeros(3)])}), "is not one record"),
    "metrics": (RecordDict({"hello": MetricRecord({"examples": 3})}), "is not one record"),
    "two records": (
        RecordDict({"hello": ConfigRecord(says("bob")), "more": ConfigRecord({})}),
        "is not one record",
    ),
    "no fields": (RecordDict({"hello": ConfigRecord({})}), "user id '' is not valid"),
    "a huge name": (says(HUGE), "is not valid"),
    "a name of bytes": (says("bob") | {"user": b"bob"}, "user id '' is not valid"),
    "a list of names": (says("bob") | {"user": ["bob", "ann"]}, "user id '' is not valid"),
    "a number for a name": (says("bob") | {"user": 7}, "user id '' is not valid"),
    "a plan of bytes": (says("bob", **{"plan-hash": b"p" * 64}), "holds another layer plan"),
    "a huge plan": (says("bob", **{"plan-hash": HUGE}), "holds another layer plan"),
    "examples NaN": (says("bob", examples=math.nan), "says it has nan examples"),
    "examples infinite": (says("bob", examples=math.inf), "says it has inf examples"),
    "a list of examples": (says("bob", examples=[1] * 100_000), "says it has .* examples"),
    "examples of text": (says("bob", examples=HUGE), "says it has .* examples"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("members", [None, {1: "ann", 2: "bob"}], ids=["open", "registered"])
def test_a_malformed_hello_is_refused_by_name_and_ends_nobodys_federation(
    name: str, members: dict[int, str] | None
) -> None:
    answer, why = MALFORMED[name]
    asked = roll(Nodes({1: [says("ann")], 2: [answer]}), ["ann", "bob"], members=members)
    asked.gather(limit=1)
    asked.check(1)
    assert asked.nodes == {1: "ann"} and asked.examples == {"ann": 10}
    ((who, said),) = asked.refused.items()
    assert re.search(why, said) and len(said) < 1000
    assert who == "bob" if members else who in ("bob", "node 2")


def test_a_node_that_fails_with_a_novel_is_quoted_in_short() -> None:
    asked = roll(Nodes({1: [says("ann")], 2: [RuntimeError(HUGE)]}), ["ann", "bob"])
    asked.gather(limit=1)
    assert len(asked.missing()["node 2"]) < 1000
    with pytest.raises(FederationError, match="node 2: xxx"):
        asked.check(0)
