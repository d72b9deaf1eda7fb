"""What a user's core has to be that comes back: of the basis that was sent, whole, finite, of a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from server.agreement import (
    PERSONAL_METRICS,
    Agreement,
    check_metrics,
    check_product,
    check_weight,
    short,
    size,
    tensors,
)
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError
from soppu.federation import wire_core

_NAMES = ("arrays", "metrics", "who")
_REFUSED = "refused"


@dataclass(frozen=True, eq=False)
class Answer:
    """One user's core as it came, and what it cost."""

    placed: CoreInBasis
    metrics: MetricRecord
    bytes_up: int
    change: float  # Frobenius norm of what was changed of the numbers that all began with


@dataclass(frozen=True, eq=False)
class CoreAgreement:
    """What every core has to match.

    Attributes:
        whole: what is agreed on adapters in this federation: the plan, and how far one user may go.
        basis: that the cores are told in.
        own_rank: of the user's own beside the core, in every module.
        shared: the core that all begin with; where the basis has something in common it is of this.
        start: what all begin with of their own, as it is on the wire.
    """

    whole: Agreement
    basis: CoreBasis
    own_rank: int
    shared: CoreAdapter
    start: Mapping[str, Tensor]

    def read(self, message: Message, user: str) -> Answer:
        """One user's part of a reply.

        Raises:
            AdapterError: the client failed, could not train this user, or anything is not as agreed.
        """
        arrays, metrics, who = self._records(message, user)
        self._check_who(who, user)
        check_metrics(metrics, user, PERSONAL_METRICS)
        check_weight(metrics, user, most=self.whole.max_examples)
        state = tensors(arrays, user)
        placed = wire_core.from_state(state, self.basis, own_rank=self.own_rank, who=user, start=self.shared)
        check_product(placed.to_lora(), user)
        moved = size({name: state[name].double() - begun.double() for name, begun in self.start.items()})
        came = sum(record.count_bytes() for record in (arrays, metrics, who))
        return Answer(placed, metrics, came, moved)

    def _records(self, message: Message, user: str) -> tuple[ArrayRecord, MetricRecord, ConfigRecord]:
        """The records of one user."""
        if message.has_error():
            raise AdapterError(f"{user}: the client failed: {message.error.reason}")
        content: RecordDict = message.content
        if (refused := content.config_records.get(f"{_REFUSED}:{user}")) is not None:
            raise AdapterError(f"{user}: the client could not train: {short(refused.get('why'))}")
        arrays, metrics, who = (content.get(f"{name}:{user}") for name in _NAMES)
        if (
            not isinstance(arrays, ArrayRecord)
            or not isinstance(metrics, MetricRecord)
            or not isinstance(who, ConfigRecord)
        ):
            there = ", ".join(sorted(content)[:6]) or "nothing"
            raise AdapterError(f"{user}: the reply holds {there}; expected {', '.join(_NAMES)} of this user")
        return arrays, metrics, who

    def _check_who(self, who: ConfigRecord, user: str) -> None:
        wanted = {"user": user, "plan-hash": self.whole.plan_hash, "form": wire_core.FORM}
        wanted |= {"basis": self.basis.id}
        for name, value in wanted.items():
            if (said := who.get(name)) != value:
                raise AdapterError(f"{user}: the reply says {name} {str(said)[:80]!r}, agreed: {value!r}")
