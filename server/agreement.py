"""What every reply of a client has to be, and the adapter that is in it.

A reply is read in the form it says it has; nothing is guessed. Whatever a sender can get wrong, by mistake
or on purpose, is an AdapterError that names the user.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError
from soppu.federation import wire, wire_ternary
from soppu.federation.modes import Sharing

WEIGHT = "num-examples"
LOSS, TERNARY_LOSS = "emulator-loss", "emulator-loss-ternary"
BASE_LOSS, SHARED_LOSS = "emulator-loss-base", "emulator-loss-shared"
METRICS = (WEIGHT, "train-loss-first", "train-loss-last", BASE_LOSS, SHARED_LOSS, LOSS)
PERSONAL_METRICS = (*METRICS, "learning-rate", "steps", "share")  # how a user's own adapter was made
_LARGEST = 1e12  # of any metric
_LARGEST_LOSS = 1e4  # nats a token; where losses are averaged a user's are everybody's
_LONGEST = 300  # characters of anything a sender said that are repeated
_HARMLESS = 1e-3
_REPLY = {"arrays": ArrayRecord, "metrics": MetricRecord, "who": ConfigRecord}


@dataclass(frozen=True)
class Agreement:
    """What every reply has to match.

    Attributes:
        plan_hash: hash of the layer plan the server works with.
        shapes: full-model name -> (o, i) of every adapted module.
        rank: LoRA rank.
        base_model, base_hash, fan_in_fan_out: written into the adapters that are kept.
        form: "ternary" if users' own adapters may come so; float32 is always allowed.
        max_loss: by how much the validation loss of one that does may have risen, nats a token.
        max_examples: how many examples any user may say to have trained on.
        examples: user -> how many they said at hello; no reply may name more.
        max_update: how many times the median change of a round one user's may be.
        sharing: what of an adapter comes in which round; None: the whole of it in each.
    """

    plan_hash: str
    shapes: Mapping[str, tuple[int, int]]
    rank: int
    base_model: str
    base_hash: str
    fan_in_fan_out: bool
    form: str = wire.FLOAT32
    max_loss: float = 0.0
    max_examples: int = 1_000_000
    examples: Mapping[str, int] = field(default_factory=dict)
    max_update: float = 10.0
    sharing: Sharing | None = None

    @cached_property
    def mode(self) -> Sharing:
        """What comes in which round."""
        return self.sharing or Sharing("finetune", self.rank)

    @cached_property
    def _own(self) -> Mapping[str, Tensor]:
        return self.mode.start(self.shapes)[1]

    def adapter(self, state: Mapping[str, Tensor], *, who: str, form: str = wire.FLOAT32) -> LoraAdapter:
        """Tensors -> adapter; AdapterError names `who` and what is wrong."""
        read = wire_ternary.from_ternary if form == wire.TERNARY else wire.from_state
        return read(
            state,
            self.shapes,
            rank=self.rank,
            who=who,
            base_model=self.base_model,
            base_hash=self.base_hash,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def shared(self, state: Mapping[str, Tensor], *, who: str) -> LoraAdapter:
        """What is shared -> the adapter of a user whose own part is as it began; AdapterError as above."""
        wire.check(state, self.mode.sent(self.shapes, personal=False), who=who)
        return self.adapter(self.mode.join(state, self._own), who=who)

    def read(
        self, message: Message, user: str, *, personal: bool, begun: Mapping[str, Tensor] | None = None
    ) -> tuple[str, LoraAdapter]:
        """The form and the adapter of a user's reply: whole, or in a shared round what `shared` makes of it.

        Args:
            begun: the shared tensors of the round's start: the adapter of one who has nothing to send back.

        Raises:
            AdapterError: the client failed, or anything in the reply is not as agreed.
        """
        if message.has_error():
            raise AdapterError(f"{user}: the client failed: {message.error.reason}")
        if {name: type(record) for name, record in message.content.items()} != _REPLY:
            found = ", ".join(sorted(message.content))
            raise AdapterError(f"{user}: the reply holds {found or 'nothing'}; expected {', '.join(_REPLY)}")
        ternary = personal and self.mode.trains_alone and self.form == wire.TERNARY
        form = self._form(message.content.config_records["who"], user, ternary=ternary)
        metrics = message.content.metric_records["metrics"]
        names = PERSONAL_METRICS if personal else METRICS
        check_metrics(metrics, user, (*names, TERNARY_LOSS) if ternary else names)
        check_weight(metrics, user, most=self.examples.get(user, self.max_examples))
        if form == wire.TERNARY:
            self._check_rise(metrics, user)
        state = tensors(message.content.array_records["arrays"], user)
        if not personal:
            adapter = self.shared(state, who=user)
        elif self.mode.trains_alone:
            adapter = self.adapter(state, who=user, form=form)
        else:
            wire.check(state, {}, who=user)
            adapter = self.shared(begun or {}, who="server")
        check_product(adapter, user)
        return form, adapter

    def outsized(self, changes: Mapping[str, float], *, start: float) -> dict[str, str]:
        """Users whose change would outweigh everybody else's in a mean -> what to tell of it.

        The yardstick is the median of the round, the lower of two: whoever sends more than half of the
        replies sets it. A change below a thousandth of `start`, the size of what all began with, harms
        nobody.

        Args:
            changes: user -> size of what they changed (`change`).
        """
        if not changes:
            return {}
        median = statistics.median_low(changes.values())
        limit = self.max_update * max(median, _HARMLESS * start)
        return {
            user: f"{user}: changed the adapter by {size:.4g}, where the median of the round is {median:.4g};"
            f" federation.max_update = {self.max_update:g} allows {limit:.4g}"
            for user, size in changes.items()
            if not size <= limit
        }

    def _form(self, who: ConfigRecord, user: str, *, ternary: bool) -> str:
        """What the reply says of itself: whose it is, for which plan, in which form."""
        if who.get("user") != user:
            raise AdapterError(f"{user}: the reply says it is from {who.get('user')!r}")
        if who.get("plan-hash") != self.plan_hash:
            found, ours = str(who.get("plan-hash"))[:12], self.plan_hash[:12]
            raise AdapterError(f"{user}: trained on plan {found}, ours is {ours}")
        form, allowed = who.get("form"), (wire.FLOAT32, *((wire.TERNARY,) if ternary else ()))
        if form not in allowed:
            raise AdapterError(f"{user}: sent in the form {form!r}, allowed here: {', '.join(allowed)}")
        return cast(str, form)

    def _check_rise(self, metrics: MetricRecord, user: str) -> None:
        rise = cast(float, metrics[TERNARY_LOSS]) - cast(float, metrics[LOSS])
        if rise > self.max_loss:
            raise AdapterError(
                f"{user}: sent ternary, which raises the validation loss by {rise:.4g},"
                f" allowed: at most {self.max_loss:g}"
            )


def short(said: object) -> str:
    """What came from outside, at most `_LONGEST` characters of it."""
    text = said if isinstance(said, str) else repr(said)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def size(state: Mapping[str, Tensor]) -> float:
    """Frobenius norm over all tensors, in float64: the square of a large float32 is not one."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in state.values()))


def change(adapter: LoraAdapter, start: Mapping[str, Tensor]) -> float:
    """How far an adapter's factors are from those a round began with: FedAvg averages factors."""
    return size({name: new.double() - start[name].double() for name, new in wire.to_state(adapter).items()})


def tensors(arrays: ArrayRecord, user: str) -> dict[str, Tensor]:
    """What a user sent. AdapterError if it cannot be read."""
    try:
        return arrays.to_torch_state_dict()
    except Exception as error:  # numpy fails on bytes from outside in a dozen ways, zipfile's too
        raise AdapterError(f"{user}: the arrays cannot be read: {error}") from error


def check_metrics(metrics: MetricRecord, user: str, names: tuple[str, ...]) -> None:
    """FedAvg divides by these and the registry stores them: the same names from all, finite numbers."""
    if set(metrics) != set(names):
        raise AdapterError(f"{user}: metrics are {', '.join(sorted(metrics))}; expected {', '.join(names)}")
    for name, value in metrics.items():
        if name == WEIGHT:
            continue  # has limits of its own
        limit = _LARGEST_LOSS if "loss" in name else _LARGEST
        if not isinstance(value, int | float) or not 0 <= value < limit:
            raise AdapterError(f"{user}: metric {name} is {value}, expected a number from 0 to {limit:g}")


def check_weight(metrics: MetricRecord, user: str, *, most: int) -> None:
    """A user weighs as much as the text they said to have, and no more: the mean is everybody's."""
    value = metrics[WEIGHT]
    if type(value) is not int or not 1 <= value <= most:
        raise AdapterError(
            f"{user}: metric {WEIGHT} is {value}, expected at least 1 and at most {most}, a whole number"
        )


def check_product(adapter: LoraAdapter, user: str) -> None:
    """Finite factors may have a product that is not: refuse what B @ A could overflow float32 with."""
    for name, pair in adapter.pairs.items():
        bound = float(pair.A.double().norm()) * float(pair.B.double().norm())
        if bound > torch.finfo(torch.float32).max:
            raise AdapterError(f"{user}: {name}: factors so large that their product B @ A may be infinite")
