"""The ServerApp's other task: every user's losses, measured on the user's own node.

Every node is sent the adapters of its own user and of nobody else; numbers come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError
from soppu.federation import wire

EXAMPLES = "num-examples"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is asked, and of whom.

    Attributes:
        nodes: node -> user, of everybody to be measured; known from registered keys, not from what nodes say.
        adapters: user -> column -> the adapter that is measured there; no adapter is measured under "base".
        emulator: the emulator's LoRA, in wire names.
        order: settings and plan, as for training.
        most_examples: how many a user may say were measured on.
        timeout_s: how long answers are waited for.
    """

    nodes: Mapping[int, str]
    adapters: Callable[[str], Mapping[str, LoraAdapter]]
    emulator: Mapping[str, Tensor]
    order: ConfigRecord
    most_examples: int
    timeout_s: float

    def run(self, grid: Grid) -> dict[str, dict[str, Any]]:
        """`losses`, user -> what was measured, and `refused`, user -> why there is nothing of them."""
        losses: dict[str, dict[str, float]] = {}
        refused = dict.fromkeys(
            self.nodes.values(), "the user's node is not there, or gave no answer in time"
        )
        columns: dict[str, list[str]] = {}
        messages = [self._question(node, user, columns) for node, user in self.nodes.items()]
        for reply in grid.send_and_receive(messages, timeout=self.timeout_s) if messages else []:
            if (user := self.nodes.get(reply.metadata.src_node_id)) is None:
                continue  # the SuperLink itself, which says that a node has gone
            try:
                losses[user] = self._read(reply, user, [f"loss-{name}" for name in columns[user]])
                refused.pop(user)
            except AdapterError as error:
                refused[user] = str(error)
        return {"losses": losses, "refused": refused}

    def _question(self, node: int, user: str, columns: dict[str, list[str]]) -> Message:
        state = dict(self.emulator)
        columns[user] = ["base"]
        for column, adapter in self.adapters(user).items():
            columns[user].append(column)
            state.update(wire.to_state(adapter, prefix=f"{column}/"))
        content = RecordDict({"arrays": ArrayRecord(state), "config": self.order})
        return Message(content=content, message_type=MessageType.EVALUATE, dst_node_id=node)

    def _read(self, reply: Message, user: str, wanted: list[str]) -> dict[str, float]:
        """The numbers of a reply; AdapterError if the client failed, or they are none."""
        if reply.has_error():
            raise AdapterError(f"{user}: the client failed: {reply.error.reason}")
        who = reply.content.config_records.get("who", ConfigRecord())
        if who.get("user") != user:
            raise AdapterError(f"{user}: the reply says it is from {who.get('user')!r}")
        numbers = reply.content.metric_records.get("metrics", MetricRecord())
        count = numbers.get(EXAMPLES)
        if type(count) is not int or not 1 <= count <= self.most_examples:
            raise AdapterError(
                f"{user}: metric {EXAMPLES} is {count!r}, expected a whole number from 1 to"
                f" {self.most_examples}"
            )
        return {EXAMPLES: count, **{name: _loss(numbers, name, user) for name in wanted}}


def _loss(numbers: MetricRecord, name: str, user: str) -> float:
    value = numbers.get(name)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise AdapterError(f"{user}: metric {name} is {value!r}, expected a finite number of 0 or more")
    return float(value)
