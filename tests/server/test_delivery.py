"""A crash is asked again within the round, silence costs the round alone, nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from server import delivery
from server.delivery import Delivery
from tests.server.grid import InProcessGrid

pytestmark = pytest.mark.usefixtures("flower_identity")

FINE, CRASH, SILENT = "fine", "crash", "silent"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_POLL_S", 0.01)


class Clients(InProcessGrid):
    """Nodes whose answers are written down, the last of them for good; `away` is who is not connected."""

    def __init__(self, answers: dict[int, list[str]]) -> None:
        super().__init__([])
        self.answers = {node: list(said) for node, said in answers.items()}
        self.away: set[int] = set()
        self.looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return [node for node in self.answers if node not in self.away]

    def _answer(self, message: Message) -> Message | None:
        self.sent.append(message)
        said = self.answers[message.metadata.dst_node_id]
        now = said.pop(0) if len(said) > 1 else said[0]
        if now == FINE:
            return Message(RecordDict({"who": ConfigRecord({})}), reply_to=message)
        return None if now == SILENT else Message(Error(code=0, reason="the actor died"), reply_to=message)


def messages(*nodes: int) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"mode": "shared"})})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def outcome(replies: list[Message]) -> dict[int, bool]:
    """Node -> whether its reply is a good one."""
    assert len({reply.metadata.src_node_id for reply in replies}) == len(replies)
    return {reply.metadata.src_node_id: reply.has_content() for reply in replies}


def test_a_client_that_crashes_is_asked_again_and_keeps_its_place() -> None:
    grid = Clients({1: [FINE], 2: [CRASH, FINE], 3: [CRASH, CRASH, FINE]})
    assert outcome(Delivery(grid).send_and_receive(messages(1, 2, 3), timeout=60)) == {
        1: True,
        2: True,
        3: True,
    }
    assert sorted(m.metadata.dst_node_id for m in grid.sent) == [1, 2, 2, 3, 3, 3]
    assert all(m.content["config"]["mode"] == "shared" for m in grid.sent)


def test_a_client_that_crashes_each_time_is_lost_after_a_few_attempts() -> None:
    grid = Clients({1: [CRASH], 2: [FINE]})
    assert outcome(Delivery(grid, attempts=3).send_and_receive(messages(1, 2), timeout=60)) == {
        1: False,
        2: True,
    }
    assert [m.metadata.dst_node_id for m in grid.sent].count(1) == 3


def test_a_client_that_hangs_costs_the_time_of_the_round_and_no_more() -> None:
    grid = Clients({1: [SILENT], 2: [FINE], 3: [CRASH, FINE]})
    replies = Delivery(grid).send_and_receive(messages(1, 2, 3), timeout=0.5)
    assert outcome(replies) == {2: True, 3: True}
    grid.answers[1] = [FINE]
    assert outcome(Delivery(grid).send_and_receive(messages(1, 2), timeout=60)) == {1: True, 2: True}


def test_a_message_does_not_outlive_its_round_by_much() -> None:
    """So that a client that starts with it late knows that nobody waits."""
    grid = Clients({1: [FINE], 2: [CRASH, FINE]})
    Delivery(grid).send_and_receive(messages(1, 2), timeout=60)
    for message in grid.sent:
        assert 60 < message.metadata.ttl <= 60 + delivery._SLACK_S
    assert len({id(message) for message in grid.sent}) == 3


class ComesBack(Clients):
    """Node 1 is gone for a few looks after it has crashed."""

    def __init__(self, answers: dict[int, list[str]], *, gone_for: int) -> None:
        super().__init__(answers)
        self.back_at = gone_for

    def get_node_ids(self) -> Iterable[int]:
        self.away = {1} if self.sent and self.looks < self.back_at else set()
        return super().get_node_ids()


def test_a_node_that_went_is_asked_again_when_it_is_back() -> None:
    grid = ComesBack({1: [CRASH, FINE], 2: [FINE]}, gone_for=20)
    assert outcome(Delivery(grid).send_and_receive(messages(1, 2), timeout=60)) == {1: True, 2: True}
    assert grid.looks >= 20


def test_a_node_that_does_not_come_back_is_waited_for_no_longer_than_its_grace() -> None:
    grid = ComesBack({1: [CRASH, FINE], 2: [FINE]}, gone_for=10**9)
    started = time.monotonic()
    assert outcome(Delivery(grid, grace_s=0.2).send_and_receive(messages(1, 2), timeout=600)) == {
        1: False,
        2: True,
    }
    assert time.monotonic() - started < 300


def test_a_node_that_is_not_there_at_all_is_an_error_of_its_own() -> None:
    grid = Clients({1: [FINE], 2: [FINE]})
    grid.away = {2}
    replies = Delivery(grid, grace_s=0.1).send_and_receive(messages(1, 2), timeout=60)
    assert outcome(replies) == {1: True, 2: False}
    (lost,) = [reply for reply in replies if reply.has_error()]
    assert "could not be handed over" in str(lost.error.reason)


def test_what_flower_will_not_take_is_an_error_and_not_silence() -> None:
    class Full(Clients):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[Any]:
            return [None for _ in messages]

    replies = Delivery(Full({1: [FINE]}), grace_s=0.1).send_and_receive(messages(1), timeout=60)
    assert outcome(replies) == {1: False}


def test_who_has_answered_is_told_once_each_whatever_the_answer_and_after_how_many_attempts() -> None:
    grid, heard = Clients({1: [FINE], 2: [CRASH, FINE], 3: [CRASH]}), list[tuple[int, int, int]]()
    told = Delivery(grid, attempts=2, heard=lambda *said: heard.append(said))
    told.send_and_receive(messages(1, 2, 3), timeout=60)
    assert sorted(node for node, _, _ in heard) == [1, 2, 3]
    assert [(done, total) for _, done, total in heard] == [(1, 3), (2, 3), (3, 3)]
