"""A message has its time: who hangs is ended, who is late is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.limit import within_its_time
from soppu.errors import FederationError

ROOT = Path(__file__).resolve().parents[2]
SLEEPER = """
import time
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from clients.limit import within_its_time
TaskIdentity._task_id = TaskIdentity._run_id = TaskIdentity._node_id = 1
message = Message(RecordDict({}), dst_node_id=7, message_type="train", ttl=0.5)
context = Context(run_id=1, node_id=7, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
def hang(message, context):
    while True:
        time.sleep(0.1)
        try:
            time.sleep(0.1)
        except BaseException:  # nothing gets it to stop
            pass
print("began", flush=True)
within_its_time(message, context, hang)
"""


def message(*, ttl: float, age: float = 0.0) -> Message:
    made = Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=7, message_type="train", ttl=ttl)
    made.metadata.__dict__["_created_at"] = time.time() - age
    return made


def node(**config: Any) -> Context:
    return Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})


def answer(message: Message, context: Context) -> Message:
    return Message(RecordDict({}), reply_to=message)


def test_a_client_that_sleeps_through_its_time_is_ended_and_says_where_it_hung() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLEEPER], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "began\n" and done.returncode != 0
    assert "Timeout" in done.stderr and "in hang" in done.stderr


@pytest.mark.usefixtures("flower_identity")
def test_a_message_of_a_round_that_is_over_is_not_worked_on() -> None:
    with pytest.raises(FederationError, match="came too late"):
        within_its_time(message(ttl=60, age=61), node(**{"partition-id": 0}), answer)
    assert within_its_time(message(ttl=60, age=30), node(**{"partition-id": 0}), answer).has_content()


@pytest.mark.usefixtures("flower_identity")
def test_another_machines_clock_is_not_believed() -> None:
    """Its server may be an hour ahead or behind; it has all of a message's life from when it came."""
    for age in (3600.0, -3600.0):
        assert within_its_time(message(ttl=60, age=age), node(**{"user-id": "alice"}), answer).has_content()


@pytest.mark.usefixtures("flower_identity")
def test_what_was_answered_in_time_is_not_ended_later() -> None:
    within_its_time(message(ttl=1), node(**{"user-id": "alice"}), answer)
    with pytest.raises(ValueError, match="the client's own"):
        within_its_time(message(ttl=1), node(**{"user-id": "alice"}), failing)
    time.sleep(1.2)  # this process would be gone


def failing(message: Message, context: Context) -> Message:
    raise ValueError("the client's own")
