"""The round of cores: what is asked of a node, what is made of its reply, what is noted of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from server.agreement import LOSS, SHARED_LOSS, WEIGHT, short, size
from server.core_agreement import Answer, CoreAgreement
from server.strategy import Received, RoundLog
from soppu.cores.core import CoreAdapter
from soppu.errors import AdapterError
from soppu.federation import wire_core

CORES = f"{MessageType.TRAIN}.cores"
_AVERAGED = {"train_loss": "train-loss-last", "emulator_loss": LOSS, "shared_loss": SHARED_LOSS}


@dataclass
class CoreLog(RoundLog):
    """A round of cores as it went."""

    bytes_basis: int = 0  # of `bytes_down`: the basis, to nodes that had not got it
    examples: int = 0  # of the accepted, by which losses are averaged
    changes: dict[str, float] = field(default_factory=dict)  # of the accepted

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> CoreLog:
        """What `dataclasses.asdict` gave."""
        received = {user: Received(**one) for user, one in told["received"].items()}
        return cls(**{**told, "received": received})


@dataclass(frozen=True, eq=False)
class CoreRound:
    """What all waves of the round have in common.

    Attributes:
        emulator, start: the emulator's LoRA, and the core that everybody begins with.
        order: settings, plan and the basis' id.
        basis: the bytes of its file.
        keep: stores one user's core.
    """

    agreement: CoreAgreement
    emulator: ArrayRecord
    start: ArrayRecord
    order: ConfigRecord
    basis: bytes
    log: CoreLog
    keep: Callable[[str, CoreAdapter, MetricRecord], None]

    def message(self, node: int, users: tuple[str, ...], *, basis: bool) -> Message:
        """What a node is asked.

        Args:
            basis: whether it is sent along: the node has not got it.
        """
        order = ConfigRecord({**self.order, "users": list(users), "server-round": self.log.round})
        records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
            "arrays": self.emulator,
            "start": self.start,
            "config": order,
        }
        if basis:
            sent = ConfigRecord({"file": self.basis})
            self.log.bytes_basis += sent.count_bytes()
            records["basis"] = sent
        self.log.bytes_down += sum(record.count_bytes() for record in records.values())
        return Message(content=RecordDict(records), message_type=CORES, dst_node_id=node)

    def read(self, replies: Mapping[tuple[str, ...], Message]) -> None:
        """The replies of a wave, by whom each is of: cores are kept, what is not as agreed is refused."""
        answers: dict[str, Answer] = {}
        for users, reply in sorted(replies.items()):
            self.log.bytes_up += sum(record.count_bytes() for record in reply.content.values())
            for user in users:
                try:
                    answers[user] = self.agreement.read(reply, user)
                except AdapterError as error:
                    self.log.refused[user] = short(str(error))
        changes = {**self.log.changes, **{user: answer.change for user, answer in answers.items()}}
        outsized = self.agreement.whole.outsized(changes, start=size(self.agreement.shared.tensors()))
        for user in [user for user in answers if user in outsized]:
            self.log.refused[user] = outsized[user]
            del answers[user]
        for user, answer in answers.items():
            self._accept(user, answer)

    def lose(self, user: str, why: str) -> None:
        """Note a user whose client crashed or was silent."""
        self.log.refused[user] = short(why)
        self.log.lost.append(user)

    def _accept(self, user: str, answer: Answer) -> None:
        log, metrics = self.log, answer.metrics
        self.keep(user, answer.placed.core, metrics)
        log.accepted.append(user)
        log.changes[user] = answer.change
        told = float(cast(float, metrics[LOSS]))
        log.received[user] = Received(wire_core.FORM, answer.bytes_up, loss_float32=told, loss_ternary=None)
        weight = cast(int, metrics[WEIGHT])
        log.examples += weight
        for name, metric in _AVERAGED.items():
            mean = getattr(log, name)
            setattr(log, name, mean + (float(cast(float, metrics[metric])) - mean) * weight / log.examples)
