"""FedBiOT as a Flower strategy: a mean of what is shared of users' LoRA, then one personal round.

This is the federation's server. The HTTP server that answers prompts is `soppu.serve`.

Shared rounds average what comes back (`server.aggregate` knows how). In the personal round every user's own
adapter is kept as it is, under the user's name. A damaged reply is refused by name; the round goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from server.aggregate import Reply, averaged
from server.agreement import LOSS, SHARED_LOSS, TERNARY_LOSS, WEIGHT, Agreement, change, short, size
from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError
from soppu.federation import wire
from soppu.sharing import SharingSettings

SHARED, PERSONAL = "shared", "personal"


@dataclass(frozen=True)
class Received:
    """How one user's adapter came: its form, the bytes of the reply, the validation losses told.

    Attributes:
        form: "float32" or "ternary".
        bytes_up: of the whole reply.
        loss_float32: on the client's emulator, of the adapter as trained.
        loss_ternary: of its ternary form, sent or not; None where there was none.
        own_since: the round that the user's own part was trained on from, as the client says; 0 is anew.
    """

    form: str
    bytes_up: int
    loss_float32: float
    loss_ternary: float | None
    own_since: int | None = None


@dataclass
class RoundLog:
    """One round as it went: what was sent, what came back, who was refused and why."""

    round: int
    mode: str
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    train_loss: float = 0.0
    emulator_loss: float = 0.0  # on users' validation text, of what each of them trained
    shared_loss: float = 0.0  # on the same text, of the shared adapter that was sent
    public_loss: float = 0.0  # of the shared adapter after the round, with the full model, on public text
    accepted: list[str] = field(default_factory=list)
    received: dict[str, Received] = field(default_factory=dict)  # of the accepted
    refused: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)  # user -> factor on the change, below 1
    lost: list[str] = field(default_factory=list)  # of the refused, those whose client crashed or was silent


class FedBiOT(FedAvg):
    """Means of what users share of their LoRA, with alignment before each round and a personal last round.

    Args:
        agreement: what replies are held against.
        nodes: node id -> user id, from the hello query; only these nodes are asked. Looked at in every round,
            after `emulator` was called: who has joined by then takes part.
        emulator: gives the emulator's LoRA tensors for a round (and may train it first).
        keep: stores one user's own adapter in the personal round.
        first_round: how many rounds were already done; Flower counts from 1 each time.
        last_round: number of the personal round, where it is known.
        sharing: how what is shared is averaged.

    Attributes:
        logs: one entry a round.
    """

    def __init__(
        self,
        agreement: Agreement,
        nodes: Mapping[int, str],
        *,
        emulator: Callable[[int, ArrayRecord], dict[str, Tensor]],
        keep: Callable[[str, LoraAdapter, MetricRecord], None],
        first_round: int = 0,
        last_round: int | None = None,
        sharing: SharingSettings | None = None,
    ) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, weighted_by_key=WEIGHT
        )
        self.agreement = agreement
        self.nodes = nodes
        self.logs: list[RoundLog] = []
        self._emulator = emulator
        self._keep = keep
        self.first_round = first_round
        self.last_round = last_round
        self._started = 0.0
        self._sharing = sharing or SharingSettings()
        self._start: dict[str, Tensor] = {}  # what is shared of the adapter that the round began with
        self._whole: dict[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a user: the shared LoRA, the emulator's LoRA, and what to do."""
        number = server_round + self.first_round
        mode = PERSONAL if number == self.last_round else SHARED
        log = RoundLog(number, mode)
        self.logs.append(log)
        self._start = arrays.to_torch_state_dict()
        self._whole = wire.to_state(self.agreement.shared(self._start, who="server"))
        state = {**self._start, **self._emulator(number, arrays)}
        record = ArrayRecord(state)
        messages = []
        for node, user in self.nodes.items():
            order = ConfigRecord({**config, "server-round": number, "mode": mode, "user": user})
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
        good, changes = self._read(replies, log)
        if log.mode == PERSONAL or not self._sharing.clip:
            for user, why in self.agreement.outsized(changes, start=size(self._whole)).items():
                log.refused[user] = why
                del good[user]
        for user, (message, form) in good.items():
            log.accepted.append(user)
            log.received[user] = _received(message, form)
            if log.mode == PERSONAL:
                # read again: to keep what was read would hold every adapter of the round in memory twice
                _, adapter = self.agreement.read(message, user, personal=True, begun=self._start)
                self._keep(user, adapter, message.content.metric_records["metrics"])
        for user in set(self.nodes.values()) - set(log.accepted) - set(log.refused):
            log.refused[user] = f"{user}: no answer in time"
            log.lost.append(user)
        log.seconds = time.monotonic() - self._started
        if not good:
            return None, None
        # in the order of names, not of arrival: a sum of floats depends on its order
        sent = {user: good[user][0] for user in sorted(good)}
        metrics = self.train_metrics_aggr_fn([reply.content for reply in sent.values()], WEIGHT)
        arrays = None if log.mode == PERSONAL else self._mean(sent, log)
        log.train_loss = cast(float, metrics["train-loss-last"])
        log.emulator_loss = cast(float, metrics[LOSS])
        log.shared_loss = cast(float, metrics[SHARED_LOSS])
        return arrays, metrics

    def _read(
        self, replies: Iterable[Message], log: RoundLog
    ) -> tuple[dict[str, tuple[Message, str]], dict[str, float]]:
        """The replies that are as agreed, each with its form, and how far each went; others are refused."""
        good: dict[str, tuple[Message, str]] = {}
        changes: dict[str, float] = {}
        for message in replies:
            user = self.nodes.get(message.metadata.src_node_id, f"node {message.metadata.src_node_id}")
            if message.has_content():
                log.bytes_up += _size(message)
            try:
                form, adapter = self.agreement.read(
                    message, user, personal=log.mode == PERSONAL, begun=self._start
                )
            except AdapterError as error:
                log.refused[user] = short(str(error))
                log.lost += [user] if message.has_error() else []
                continue
            good[user], changes[user] = (message, form), change(adapter, self._whole)
        return good, changes

    def _mean(self, replies: Mapping[str, Message], log: RoundLog) -> ArrayRecord:
        """What the next round begins with."""
        read = {
            user: Reply(
                reply.content.array_records["arrays"].to_torch_state_dict(),
                cast(int, reply.content.metric_records["metrics"][WEIGHT]),
            )
            for user, reply in replies.items()
        }
        state, log.clipped = averaged(self._start, read, self._sharing)
        return ArrayRecord(state)


def _size(message: Message) -> int:
    """Bytes of a message's records."""
    return sum(record.count_bytes() for record in message.content.values())


def _received(message: Message, form: str) -> Received:
    metrics = message.content.metric_records["metrics"]
    ternary = metrics.get(TERNARY_LOSS)
    who = message.content.config_records["who"]
    return Received(
        form,
        _size(message),
        loss_float32=float(cast(float, metrics[LOSS])),
        loss_ternary=None if ternary is None else float(cast(float, ternary)),
        own_since=since if type(since := who.get("own-since")) is int else None,
    )
