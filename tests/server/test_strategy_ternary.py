"""Signs and gains: kept as they were compressed, and refused where they are bad or were not agreed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from server.agreement import Agreement
from soppu.compress.numbers import ternary
from soppu.federation import wire, wire_ternary
from soppu.federation.wire_ternary import GAINS, SIGNS
from tests.server.bare_strategy import AGREEMENT, KEY, NODES, SEEDS, Server, answer, assert_mean, make_adapter
from tests.soppu.compress import ternary_measures as measures

pytestmark = pytest.mark.usefixtures("flower_identity")

TERNARY = dataclasses.replace(AGREEMENT, form="ternary", max_loss=0.01)


def signs(user: str) -> dict[str, Tensor]:
    return wire_ternary.to_ternary(make_adapter(SEEDS[user]), density=0.5)


def answer_ternary(messages: list[Message], *, but: str = "") -> list[Message]:
    """What clients of a ternary wire say in the personal round; `but` is one who was over the budget."""
    replies = answer(messages)
    for reply, asked in zip(replies, messages, strict=True):
        user = NODES[asked.metadata.dst_node_id]
        reply.content["metrics"]["emulator-loss-ternary"] = 1.0 + SEEDS[user] + (1.0 if user == but else 0.01)
        if user != but:
            reply.content["who"]["form"] = "ternary"
            reply.content["arrays"] = ArrayRecord(signs(user))
    return replies


def test_the_personal_round_keeps_what_the_clients_compressed() -> None:
    """Signs and float32 tensors side by side: there is no mean that would have to hold both."""
    server = Server(last_round=1, agreement=TERNARY)
    replies = answer_ternary(server.ask(), but="bob")
    arrays, metrics = server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert (arrays, log.refused) == (None, {})
    for user, adapter in server.kept.items():
        own = make_adapter(SEEDS[user])
        wanted = own if user == "bob" else measures.applied(own, ternary.fixed(own, density=0.5))
        assert adapter.content_hash() == wanted.content_hash()
        assert (adapter.base_model, adapter.base_hash, adapter.fan_in_fan_out) == ("tiny", "b" * 64, True)
    told = {user: (one.form, one.loss_float32, one.loss_ternary) for user, one in log.received.items()}
    assert told == {
        "alice": ("ternary", 2.0, 2.01),
        "bob": ("float32", 3.0, 4.0),
        "carol": ("ternary", 4.0, 4.01),
    }
    assert sum(one.bytes_up for one in log.received.values()) == log.bytes_up
    expected = (30 * 2 + 10 * 3 + 60 * 4) / 100
    assert metrics is not None and (log.train_loss, log.emulator_loss) == pytest.approx((expected, expected))


def test_a_shared_round_of_a_ternary_wire_is_averaged_in_float32() -> None:
    server = Server(agreement=TERNARY)
    arrays, _ = server.strategy.aggregate_train(1, answer(server.ask()))
    assert_mean(arrays, ["alice", "bob", "carol"])
    log = server.strategy.logs[0]
    assert {(one.form, one.loss_ternary) for one in log.received.values()} == {("float32", None)}


def sign_tensor(name: str, value: Tensor) -> Callable[[RecordDict], None]:
    return lambda content: content.update(arrays=ArrayRecord({**signs("bob"), name: value}))


def float_tensors(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord(wire.to_state(make_adapter(2)))


BAD_TERNARY: dict[str, tuple[Callable[[RecordDict], Any], str]] = {
    "NaN": (sign_tensor(GAINS, torch.full((4,), math.nan)), "holds NaN or Inf"),
    "too few gains": (sign_tensor(GAINS, torch.ones(3)), r"\(3,\), the plan says torch.float32 \(4,\)"),
    "hostile signs": (sign_tensor(SIGNS, torch.full((400,), 255, dtype=torch.uint8)), "streams of"),
    "cut signs": (sign_tensor(SIGNS, signs("bob")[SIGNS][:-1]), "streams of"),
    "unknown tensor": (sign_tensor(KEY, torch.zeros(2, 8)), "a ternary adapter of"),
    "float32 called ternary": (float_tensors, "a ternary adapter of"),
    "ternary called float32": (
        lambda content: content["who"].update(form="float32"),
        r"tensor .* is missing \(4 in all\)",
    ),
    "unknown form": (
        lambda content: content["who"].update(form="pickle"),
        "in the form 'pickle', allowed here: float32, ternary",
    ),
    "no form": (lambda content: content["who"].pop("form"), "in the form None"),
    "a list of forms": (lambda content: content["who"].update(form=["ternary"]), r"form \['ternary'\]"),
    "over the budget": (
        lambda content: content["metrics"].update({"emulator-loss-ternary": 3.5}),
        "raises the validation loss by 0.5, allowed: at most 0.01",
    ),
    "loss not told": (lambda content: content["metrics"].pop("emulator-loss-ternary"), "metrics are"),
    "loss NaN": (
        lambda content: content["metrics"].update({"emulator-loss-ternary": math.nan}),
        "metric emulator-loss-ternary is nan",
    ),
}


@pytest.mark.parametrize("fault", BAD_TERNARY)
def test_a_bad_ternary_reply_is_refused_by_name_and_the_round_goes_on(fault: str) -> None:
    change, reason = BAD_TERNARY[fault]
    server = Server(last_round=1, agreement=TERNARY)
    replies = answer_ternary(server.ask())
    change(replies[1].content)
    _, metrics = server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert list(log.refused) == ["bob"] and log.refused["bob"].startswith("bob: ")
    assert re.search(reason, log.refused["bob"]), log.refused["bob"]
    assert server.kept.keys() == log.received.keys() == {"alice", "carol"}
    assert metrics is not None and math.isfinite(log.train_loss)


@pytest.mark.parametrize(("agreement", "last_round"), [(AGREEMENT, 1), (TERNARY, 2)])
def test_nobody_sends_ternary_where_it_was_not_agreed(agreement: Agreement, last_round: int) -> None:
    """Neither on a float32 wire nor in a shared round."""
    server = Server(last_round=last_round, agreement=agreement)
    replies = answer_ternary(server.ask())
    server.strategy.aggregate_train(1, replies)
    refused = server.strategy.logs[0].refused
    assert refused.keys() == set(NODES.values()) and server.kept == {}
    assert refused["bob"] == "bob: sent in the form 'ternary', allowed here: float32"
