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

from soppu.errors import AdapterError

EXAMPLES = "num-examples"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is asked, and of whom.

    Attributes:
        nodes: node -> user, of everybody to be measured; known from registered keys, not from what nodes say.
        adapters: user -> the user's tensors in wire names, each below the name of its column.
        common: what everybody is sent besides: the emulator's LoRA, the shared adapter.
        order: settings and plan, as for training.
        columns: what has to come back, "base" among them.
        most_examples: how many a user may say were measured on.
        timeout_s: how long answers are waited for.
    """

    nodes: Mapping[int, str]
    adapters: Callable[[str], dict[str, Tensor]]
    common: Mapping[str, Tensor]
    order: ConfigRecord
    columns: tuple[str, ...]
    most_examples: int
    timeout_s: float

    def run(self, grid: Grid) -> dict[str, dict[str, Any]]:
        """`losses`, user -> what was measured, and `refused`, user -> why there is nothing of them."""
        losses: dict[str, dict[str, float]] = {}
        refused = dict.fromkeys(
            self.nodes.values(), "the user's node is not there, or gave no answer in time"
        )
        messages = [self._question(node, user) for node, user in self.nodes.items()]
        for reply in grid.send_and_receive(messages, timeout=self.timeout_s) if messages else []:
            if (user := self.nodes.get(reply.metadata.src_node_id)) is None:
                continue  # the SuperLink itself, which says that a node has gone
            try:
                losses[user] = self._read(reply, user)
                refused.pop(user)
            except AdapterError as error:
                refused[user] = str(error)
        return {"losses": losses, "refused": refused}

    def _question(self, node: int, user: str) -> Message:
        arrays = ArrayRecord({**self.common, **self.adapters(user)})
        content = RecordDict({"arrays": arrays, "config": self.order})
        return Message(content=content, message_type=MessageType.EVALUATE, dst_node_id=node)

    def _read(self, reply: Message, user: str) -> dict[str, float]:
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
        return {EXAMPLES: count, **{name: _loss(numbers, name, user) for name in self._wanted}}

    @property
    def _wanted(self) -> list[str]:
        return [f"loss-{column}" for column in self.columns]


def _loss(numbers: MetricRecord, name: str, user: str) -> float:
    value = numbers.get(name)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise AdapterError(f"{user}: metric {name} is {value!r}, expected a finite number of 0 or more")
    return float(value)
