"""Users who are poisoned, silent, late or short of text are named, and the others get their adapters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Message

from soppu.errors import FederationError
from tests.server.grid import InProcessGrid
from tests.server.small_run import (
    NODES,
    Build,
    config,
    federate,
    result,
    round_of,
    stored,
    user_of,
)

__all__ = ["config"]
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]


def test_a_poisoned_reply_is_refused_and_the_others_get_their_adapters(config: Build, tmp_path: Path) -> None:
    def poison(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and user_of(asked) == "bob":
            state = reply.content["arrays"].to_torch_state_dict()
            next(iter(state.values()))[0, 0] = math.nan
            reply.content["arrays"] = ArrayRecord(state)
        return reply

    federate(config(), tmp_path / "work", InProcessGrid(NODES, tamper=poison))
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "carol"}
    assert "bob: " in found["refused"]["bob"] and "NaN" in found["refused"]["bob"]
    assert all(list(log["refused"]) == ["bob"] for log in found["rounds"])
    assert all(
        bool(torch.isfinite(side).all())
        for adapter in stored(config(), tmp_path / "work").values()
        for pair in adapter.pairs.values()
        for side in (pair.A, pair.B)
    )


def test_a_user_who_is_silent_in_the_last_round_has_no_adapter(config: Build, tmp_path: Path) -> None:
    def silent(asked: Message, reply: Message) -> Message | None:
        last = asked.metadata.message_type == "train" and round_of(asked) == 3
        return None if last and user_of(asked) == "carol" else reply

    with pytest.raises(FederationError, match="1 users sent no adapter: carol: no answer in time"):
        federate(config(), tmp_path / "work", InProcessGrid(NODES, tamper=silent))
    assert not (tmp_path / "work" / "result.json").exists()
    allowed = config(federation={"min_users": 2})
    federate(allowed, tmp_path / "work", InProcessGrid(NODES, tamper=silent))
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "bob"}
    assert found["refused"] == {"carol": "carol: no answer in time"}
    assert found["rounds"][0]["refused"] == {}


def test_a_user_without_enough_text_is_named_and_left_out(config: Build, tmp_path: Path) -> None:
    short = {"min_examples": 8, "train_examples": 9}  # bob has nine, two of them held out
    with pytest.raises(FederationError, match="federation.min_users is 0, which wants everybody; .*bob"):
        federate(config(data=short), tmp_path / "work")
    assert not (tmp_path / "work" / "result.json").exists()
    grid, _ = federate(config(data=short, federation={"min_users": 2}), tmp_path / "work")
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "carol"}
    assert "user 'bob' has 7 examples to train on" in found["refused"]["bob"]
    assert {m.metadata.dst_node_id for m in grid.of_type("train")} == {100, 102}


def test_too_few_users_are_an_error_that_says_why(config: Build, tmp_path: Path) -> None:
    run = config(data={"min_examples": 8, "train_examples": 9}, federation={"min_users": 3})
    with pytest.raises(FederationError, match=r"2 users can train, federation.min_users is 3; .*bob"):
        federate(run, tmp_path / "work")
    assert not (tmp_path / "work" / "result.json").exists()


def test_too_few_adapters_are_an_error_that_says_why(config: Build, tmp_path: Path) -> None:
    def fail(asked: Message, reply: Message) -> Message | None:
        return None if asked.metadata.message_type == "train" else reply

    with pytest.raises(FederationError, match=r"0 adapters came back, .*no answer in time"):
        few = config(federation={"rounds": 0, "min_users": 1})
        federate(few, tmp_path / "work", InProcessGrid(NODES, tamper=fail))
    assert not (tmp_path / "work" / "result.json").exists()


def test_nodes_that_do_not_come_are_an_error(config: Build, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="1 of 3 nodes came within 1 s"):
        federate(config(), tmp_path / "work", InProcessGrid(NODES[:1]))


def test_a_user_who_was_not_there_at_hello_trains_from_the_next_round_on(
    config: Build, tmp_path: Path
) -> None:
    asked_carol: list[Message] = []

    def late(asked: Message, reply: Message) -> Message | None:
        if user_of(asked) == "carol" and asked.metadata.message_type == "query.hello":
            asked_carol.append(asked)
            return None if len(asked_carol) <= 4 else reply
        return reply

    federate(config(federation={"min_users": 2}), tmp_path / "work", InProcessGrid(NODES, tamper=late))
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "bob", "carol"}
    assert [sorted(log["accepted"]) for log in found["rounds"]] == [
        ["alice", "bob"],
        ["alice", "bob", "carol"],
        ["alice", "bob", "carol"],
    ]
    assert found["refused"] == {}
