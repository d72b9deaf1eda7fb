"""Who takes part in a federation: nobody is lost in silence, and nobody counts for more than they said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

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
        return None if now is None else Message(RecordDict({"hello": ConfigRecord(now)}), reply_to=message)


def says(user: str, **changes: Any) -> dict[str, Any]:
    return {"user": user, "plan-hash": PLAN, "examples": 10, **changes}


def roll(grid: Nodes, users: list[str]) -> Roll:
    return Roll(grid, ConfigRecord({}), plan_hash=PLAN, users=users, most_examples=64)


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
        (says("ann"), "says it is user 'ann', and so does another node"),
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
