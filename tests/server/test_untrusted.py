"""Nodes that say they are somebody else, and clients that crash or hang: what it costs, and whom."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from server.delivery import Delivery
from server.federation import Federation
from soppu.config import Config
from soppu.errors import FederationError
from tests.server.grid import InProcessGrid
from tests.server.small_run import (
    NODES,
    USERS,
    Build,
    config,
    federate,
    result,
    round_of,
    user_of,
)

__all__ = ["config"]
# other tests cover the same lines; tracing takes a third of the time
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]


# ---- who a node is


def real_node(folder: Path, user: str, name: str = "") -> dict[str, Any]:
    """A node that says for itself who it is; `name` is another than in its file."""
    path = folder / f"{name or user}.jsonl"
    path.write_text(
        (folder / f"{user}.jsonl").read_text().replace(f'"user_id": "{user}"', f'"user_id": "{name or user}"')
    )
    return {"user-id": name or user, "data-source": str(path)}


def on_machines(
    config: Config, workdir: Path, nodes: list[dict[str, Any]], members: dict[int, str]
) -> InProcessGrid:
    """A federation of nodes that are not ours; `members` is the table of registered ones."""
    grid = InProcessGrid([{"base-model": config.base.model, **node} for node in nodes])
    Federation(config, workdir, members=members).run(grid)
    return grid


def test_a_node_that_claims_anothers_name_is_refused_and_the_rightful_one_keeps_theirs(
    config: Build, tmp_path: Path
) -> None:
    """The impostor is asked first, and answers as alice before she does."""
    users = tmp_path / "users"
    impostor = {"user-id": "alice", "data-source": str(users / "alice.jsonl")}
    nodes = [impostor, real_node(users, "alice"), real_node(users, "bob")]
    run = config(federation={"rounds": 0, "min_users": 2}, data={"users": ["alice", "bob"]})
    members = {100: "mallory", 101: "alice", 102: "bob"}
    grid = on_machines(run, tmp_path / "work", nodes, members)
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "bob"}
    assert found["refused"] == {"mallory": "says it is user 'alice', its node is 'mallory'"}
    assert {m.metadata.dst_node_id for m in grid.of_type("train")} == {101, 102}


def test_a_node_that_is_not_registered_is_told_nothing(config: Build, tmp_path: Path) -> None:
    nodes = [real_node(tmp_path / "users", user) for user in ("alice", "bob")]
    run = config(federation={"rounds": 0, "min_users": 1}, data={"users": ["alice"]})
    grid = on_machines(run, tmp_path / "work", nodes, {100: "alice"})
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice"}
    assert "node 101" in found["refused"] and "members are others" in found["refused"]["node 101"]
    assert {m.metadata.dst_node_id for m in grid.sent} == {100}


def test_a_name_other_than_the_registered_one_is_refused_before_any_training(
    config: Build, tmp_path: Path
) -> None:
    nodes = [real_node(tmp_path / "users", "alice"), real_node(tmp_path / "users", "bob", "bob@home")]
    run = config(federation={"rounds": 0, "min_users": 1}, data={"users": ["alice", "bob"]})
    grid = on_machines(run, tmp_path / "work", nodes, {100: "alice", 101: "bob"})
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice"}
    assert "says it is user 'bob%40home', its node is 'bob'" in found["refused"]["bob"]
    assert len(grid.of_type("train")) == 1


def test_nodes_on_other_machines_are_told_neither_our_paths_nor_who_else_there_is(
    config: Build, tmp_path: Path
) -> None:
    run = config(federation={"rounds": 0}, data={"users": ["alice", "bob"]}, base={"cache": "/srv/cache"})
    federation = Federation(run, tmp_path / "work", members={100: "alice", 101: "bob"})
    told = federation.told()
    assert "cache" not in told["base"] and "source" not in told["data"] and "users" not in told["data"]
    assert "model" not in told["base"]  # the path of a folder of ours: the node knows its own
    text = json.dumps(told)
    for secret in (str(tmp_path), "/srv/cache", "alice", "bob"):
        assert secret not in text
    hub = Federation(run, tmp_path / "work", members={})
    hub.config = dataclasses.replace(run, base=dataclasses.replace(run.base, model="smollm2-135m"))
    assert hub.told()["base"] == {"model": "smollm2-135m"}


# ---- clients that crash or hang, in rounds of their own


def failing(
    fails: Callable[[str, int, int], str],
) -> Callable[[Message, Message], Message | None]:
    """`fails(user, round, how often asked)` -> "crash", "hang" or "" for every message of training."""
    asked_of: dict[tuple[str, int], int] = {}

    def tamper(asked: Message, reply: Message) -> Message | None:
        if asked.metadata.message_type != "train":
            return reply
        place = (user_of(asked), round_of(asked))
        asked_of[place] = asked_of.get(place, 0) + 1
        what = fails(*place, asked_of[place])
        return None if what == "hang" else Message(Error(0, "died"), reply_to=asked) if what else reply

    return tamper


def delivered(config: Config, workdir: Path, fails: Callable[[str, int, int], str]) -> dict[str, Any]:
    """What a federation gives whose messages go the way they do in earnest."""
    grid = InProcessGrid(NODES, tamper=failing(fails))
    Federation(config, workdir).run(Delivery(grid, grace_s=1))
    return result(workdir)


def test_a_client_that_crashes_is_asked_again_in_the_round_and_nothing_differs(
    config: Build, tmp_path: Path
) -> None:
    federate(config(registry={"root": str(tmp_path / "whole")}), tmp_path / "undisturbed")
    found = delivered(config(), tmp_path / "work", lambda user, number, times: "crash" * (times < 2))
    assert found["adapters"] == result(tmp_path / "undisturbed")["adapters"]
    assert all(sorted(log["accepted"]) == list(USERS) and not log["lost"] for log in found["rounds"])


def test_a_client_that_hangs_costs_its_place_in_the_round_and_not_the_attempt(
    config: Build, tmp_path: Path
) -> None:
    run = config(federation={"round_timeout_s": 2})
    found = delivered(
        run, tmp_path / "work", lambda user, number, times: "hang" * (user == "carol" and number == 1)
    )
    assert found["adapters"].keys() == USERS.keys()
    first, *later = found["rounds"]
    assert first["lost"] == ["carol"] and first["refused"] == {"carol": "carol: no answer in time"}
    assert sorted(first["accepted"]) == ["alice", "bob"]
    assert all(sorted(log["accepted"]) == list(USERS) for log in later)


@pytest.mark.parametrize("least", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_round_that_most_are_lost_in_is_not_averaged_but_done_again(
    config: Build, tmp_path: Path, least: int
) -> None:
    run = config(federation={"min_users": least})
    with pytest.raises(FederationError, match=r"round 1: 1 of 3 users answered, at least 2 have to: .*bob"):
        delivered(run, tmp_path / "work", lambda user, number, times: "crash" * (user != "alice"))
    found = delivered(run, tmp_path / "work", lambda user, number, times: "")
    assert [sorted(log["accepted"]) for log in found["rounds"]] == [list(USERS)] * 3
    assert found["adapters"].keys() == USERS.keys()
