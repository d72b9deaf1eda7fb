"""FedBiOT as a Flower strategy: FedAvg on the shared LoRA, then one personal round.

This is the federation's server. The HTTP server that answers prompts is `soppu.serve`.

Shared rounds average what comes back, weighted by examples. In the personal round every user's own
adapter is kept as it is, under the user's name. A damaged reply is refused by name; the round goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from soppu import wire
from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError

SHARED, PERSONAL = "shared", "personal"
WEIGHT = "num-examples"
METRICS = (WEIGHT, "train-loss-first", "train-loss-last", "emulator-loss-base", "emulator-loss")
_REPLY = {"arrays": ArrayRecord, "metrics": MetricRecord, "who": ConfigRecord}


@dataclass(frozen=True)
class Agreement:
    """What every reply has to match.

    Attributes:
        plan_hash: hash of the layer plan the server works with.
        shapes: full-model name -> (o, i) of every adapted module.
        rank: LoRA rank.
        base_model, base_hash, fan_in_fan_out: written into the adapters that are kept.
    """

    plan_hash: str
    shapes: Mapping[str, tuple[int, int]]
    rank: int
    base_model: str
    base_hash: str
    fan_in_fan_out: bool

    def adapter(self, state: Mapping[str, Tensor], *, who: str) -> LoraAdapter:
        """Tensors -> adapter; AdapterError names `who` and what is wrong."""
        return wire.from_state(
            state,
            self.shapes,
            rank=self.rank,
            who=who,
            base_model=self.base_model,
            base_hash=self.base_hash,
            fan_in_fan_out=self.fan_in_fan_out,
        )


@dataclass
class RoundLog:
    """One round as it went: what was sent, what came back, who was refused and why."""

    round: int
    mode: str
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    train_loss: float = 0.0
    emulator_loss: float = 0.0
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # of the refused, those whose client crashed or was silent


class FedBiOT(FedAvg):
    """FedAvg over the users' shared LoRA, with alignment before each round and a personal last round.

    Args:
        agreement: what replies are held against.
        nodes: node id -> user id, from the hello query; only these nodes are asked.
        emulator: gives the emulator's LoRA tensors for a round (and may train it first).
        keep: stores one user's own adapter in the personal round.
        first_round: how many rounds an earlier attempt already did; Flower counts from 1 each time.
        last_round: number of the personal round.
    """

    def __init__(
        self,
        agreement: Agreement,
        nodes: Mapping[int, str],
        *,
        emulator: Callable[[int, ArrayRecord], dict[str, Tensor]],
        keep: Callable[[str, LoraAdapter, MetricRecord], None],
        first_round: int,
        last_round: int,
    ) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, weighted_by_key=WEIGHT
        )
        self.agreement = agreement
        self.nodes = dict(nodes)
        self.logs: list[RoundLog] = []
        self._emulator = emulator
        self._keep = keep
        self._offset = first_round
        self._last = last_round
        self._started = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a user: the shared LoRA, the emulator's LoRA, and what to do."""
        number = server_round + self._offset
        mode = PERSONAL if number == self._last else SHARED
        log = RoundLog(number, mode)
        self.logs.append(log)
        state = {**arrays.to_torch_state_dict(), **self._emulator(number, arrays)}
        record = ArrayRecord(state)
        messages = []
        for node in self.nodes:
            order = ConfigRecord({**config, "server-round": number, "mode": mode})
            content = RecordDict({self.arrayrecord_key: record, self.configrecord_key: order})
            log.bytes_down += record.count_bytes() + order.count_bytes()
            messages.append(Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node))
        self._started = time.monotonic()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, refuse by name, then average (shared) or keep apart (personal)."""
        log = self.logs[-1]
        good: dict[str, Message] = {}
        for message in replies:
            user = self.nodes.get(message.metadata.src_node_id, f"node {message.metadata.src_node_id}")
            if message.has_content():
                log.bytes_up += sum(record.count_bytes() for record in message.content.values())
            try:
                adapter = self._checked(message, user)
            except AdapterError as error:
                log.refused[user] = str(error)
                log.lost += [user] if message.has_error() else []
                continue
            log.accepted.append(user)
            good[user] = message
            if log.mode == PERSONAL:
                self._keep(user, adapter, message.content.metric_records["metrics"])
        for user in set(self.nodes.values()) - set(log.accepted) - set(log.refused):
            log.refused[user] = f"{user}: no answer in time"
            log.lost.append(user)
        log.seconds = time.monotonic() - self._started
        if not good:
            return None, None
        # in the order of names, not of arrival: a sum of floats depends on its order
        arrays, metrics = super().aggregate_train(server_round, [good[user] for user in sorted(good)])
        assert metrics is not None  # FedAvg gives both where there is a reply, and there is one
        log.train_loss = cast(float, metrics["train-loss-last"])
        log.emulator_loss = cast(float, metrics["emulator-loss"])
        return (None if log.mode == PERSONAL else arrays), metrics

    def _checked(self, message: Message, user: str) -> LoraAdapter:
        if message.has_error():
            raise AdapterError(f"{user}: the client failed: {message.error.reason}")
        if {name: type(record) for name, record in message.content.items()} != _REPLY:
            found = ", ".join(sorted(message.content))
            raise AdapterError(f"{user}: the reply holds {found or 'nothing'}; expected {', '.join(_REPLY)}")
        who = message.content.config_records["who"]
        if who.get("user") != user:
            raise AdapterError(f"{user}: the reply says it is from {who.get('user')!r}")
        if who.get("plan-hash") != self.agreement.plan_hash:
            found, ours = str(who.get("plan-hash"))[:12], self.agreement.plan_hash[:12]
            raise AdapterError(f"{user}: trained on plan {found}, ours is {ours}")
        _check_metrics(message.content.metric_records["metrics"], user)
        try:
            state = message.content.array_records["arrays"].to_torch_state_dict()
        except (EOFError, TypeError, ValueError) as error:
            raise AdapterError(f"{user}: the arrays cannot be read: {error}") from error
        return self.agreement.adapter(state, who=user)


def _check_metrics(metrics: MetricRecord, user: str) -> None:
    """FedAvg divides by these and the registry stores them: the same names from all, finite numbers."""
    if set(metrics) != set(METRICS):
        raise AdapterError(f"{user}: metrics are {', '.join(sorted(metrics))}; expected {', '.join(METRICS)}")
    for name, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{user}: metric {name} is {value}, expected a finite number")
        if name == WEIGHT and value < 1:
            raise AdapterError(f"{user}: metric {name} is {value}, expected at least 1")
