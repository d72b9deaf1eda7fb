"""The strategy: the mean by hand, every bad reply refused by name, and everybody's own kept apart."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from server.agreement import METRICS, PERSONAL_METRICS, Agreement
from server.strategy import FedBiOT
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.numbers import ternary
from soppu.federation import wire, wire_ternary
from soppu.federation.wire_ternary import GAINS, SIGNS
from tests.soppu.compress import ternary_measures as measures

pytestmark = pytest.mark.usefixtures("flower_identity")

SHAPES = {"model.layers.6.q_proj": (6, 5), "model.layers.7.down_proj": (3, 8)}
NODES = {11: "alice", 12: "bob", 13: "carol"}
EXAMPLES = {"alice": 30, "bob": 10, "carol": 60}
RANK = 2
KEY = "model.layers.7.down_proj.lora_A.weight"
AGREEMENT = Agreement("p" * 64, SHAPES, RANK, "tiny", "b" * 64, fan_in_fan_out=True)
TERNARY = dataclasses.replace(AGREEMENT, form="ternary", max_loss=0.01)


class Server:
    """A strategy, and what it asked its two callbacks to do."""

    def __init__(
        self, *, first_round: int = 0, last_round: int = 3, agreement: Agreement = AGREEMENT
    ) -> None:
        self.kept: dict[str, LoraAdapter] = {}
        self.metrics: dict[str, MetricRecord] = {}
        self.asked: list[int] = []
        self.strategy = FedBiOT(
            agreement,
            NODES,
            emulator=self.emulator,
            keep=self.keep,
            first_round=first_round,
            last_round=last_round,
        )

    def emulator(self, number: int, arrays: ArrayRecord) -> dict[str, Tensor]:
        self.asked.append(number)
        return {"emulator/model.layers.0.q_proj.lora_A.weight": torch.full((2, 2), float(number))}

    def keep(self, user: str, adapter: LoraAdapter, metrics: MetricRecord) -> None:
        self.kept[user] = adapter
        self.metrics[user] = metrics

    def ask(self, server_round: int = 1) -> list[Message]:
        arrays = ArrayRecord(wire.to_state(make_adapter(0)))
        config = ConfigRecord({"settings": "{}", "plan": "{}"})
        return list(self.strategy.configure_train(server_round, arrays, config, None))  # type: ignore[arg-type]


def make_adapter(seed: int) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(RANK, i, generator=generator), torch.randn(o, RANK, generator=generator))
        for name, (o, i) in SHAPES.items()
    }
    return LoraAdapter(pairs, "tiny", "b" * 64, fan_in_fan_out=True)


SEEDS = {"alice": 1, "bob": 2, "carol": 3}


def reply_content(user: str, *, names: tuple[str, ...] = METRICS) -> RecordDict:
    metrics = {name: 1.0 + SEEDS[user] for name in names} | {"num-examples": EXAMPLES[user]}
    return RecordDict(
        {
            "arrays": ArrayRecord(wire.to_state(make_adapter(SEEDS[user]))),
            "metrics": MetricRecord(metrics),
            "who": ConfigRecord({"user": user, "plan-hash": "p" * 64, "form": "float32"}),
        }
    )


def answer(messages: list[Message]) -> list[Message]:
    return [
        Message(
            reply_content(
                NODES[m.metadata.dst_node_id],
                names=PERSONAL_METRICS if m.content["config"]["mode"] == "personal" else METRICS,
            ),
            reply_to=m,
        )
        for m in messages
    ]


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


def weighted(users: list[str]) -> dict[str, Tensor]:
    """FedAvg written down: on A and on B, each for itself, by examples."""
    total = sum(EXAMPLES[user] for user in users)
    states = {user: wire.to_state(make_adapter(SEEDS[user])) for user in users}
    return {
        name: sum((EXAMPLES[user] / total * states[user][name] for user in users), torch.zeros(()))
        for name in states[users[0]]
    }


def assert_mean(found: ArrayRecord | None, users: list[str]) -> None:
    assert found is not None
    state = found.to_torch_state_dict()
    wanted = weighted(users)
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
        assert tensor.dtype == torch.float32


# ---- what goes out


def test_every_user_is_asked_with_the_same_tensors_and_told_what_to_do() -> None:
    server = Server(last_round=2)
    first, last = server.ask(1), server.ask(2)
    assert [m.metadata.dst_node_id for m in first] == list(NODES)
    assert {str(m.content["config"]["mode"]) for m in first} == {"shared"}
    assert {str(m.content["config"]["mode"]) for m in last} == {"personal"}
    assert [m.content["config"]["server-round"] for m in first + last] == [1] * 3 + [2] * 3
    assert server.asked == [1, 2]  # the emulator is trained once a round, not once a user
    for message in first:
        assert list(message.content.array_records) == ["arrays"]  # Flower's privacy mods want exactly one
        users, emulator = wire.split_state(message.content["arrays"].to_torch_state_dict())
        assert wire.loose_from_state(users, base_hash="b" * 64).pairs.keys() == SHAPES.keys()
        assert torch.equal(emulator["model.layers.0.q_proj.lora_A.weight"], torch.ones(2, 2))


def test_round_numbers_go_on_after_a_resume() -> None:
    server = Server(first_round=2, last_round=3)
    (message, *_) = server.ask(1)
    assert (message.content["config"]["server-round"], message.content["config"]["mode"]) == (3, "personal")
    assert server.asked == [3] and server.strategy.logs[0].round == 3


# ---- what comes back


def test_the_mean_is_weighted_by_examples_and_taken_of_a_and_b_apart() -> None:
    server = Server()
    arrays, metrics = server.strategy.aggregate_train(1, answer(server.ask()))
    assert_mean(arrays, ["alice", "bob", "carol"])
    log = server.strategy.logs[0]
    expected = (30 * 2 + 10 * 3 + 60 * 4) / 100
    assert (log.train_loss, log.emulator_loss) == pytest.approx((expected, expected))
    assert metrics is not None and metrics["train-loss-first"] == pytest.approx(expected)
    assert (sorted(log.accepted), log.refused) == (["alice", "bob", "carol"], {})
    assert server.kept == {}  # nobody's own adapter is stored in a shared round


def test_the_mean_does_not_depend_on_who_answers_first() -> None:
    results = []
    for turn in (1, -1):
        server = Server()
        arrays, _ = server.strategy.aggregate_train(1, answer(server.ask())[::turn])
        assert arrays is not None
        results.append(arrays.to_torch_state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_the_personal_round_keeps_each_users_own() -> None:
    server = Server(last_round=1)
    arrays, _ = server.strategy.aggregate_train(1, answer(server.ask()))
    assert arrays is None  # there is no mean to go on with
    assert server.kept.keys() == set(NODES.values())
    for user, adapter in server.kept.items():
        assert adapter.content_hash() == make_adapter(SEEDS[user]).content_hash()
        assert (adapter.base_model, adapter.fan_in_fan_out) == ("tiny", True)
        assert server.metrics[user]["num-examples"] == EXAMPLES[user]


def test_bytes_are_those_of_the_records() -> None:
    server = Server()
    messages = server.ask()
    replies = answer(messages)
    server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]

    def size(items: list[Message]) -> int:
        return sum(record.count_bytes() for message in items for record in message.content.values())

    assert log.bytes_down == size(messages) > 3 * 4 * (2 * 5 + 6 * 2 + 2 * 8 + 3 * 2)
    assert log.bytes_up == size(replies) > 0
    assert log.seconds >= 0


# ---- in which form


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


# ---- what must not get in


def tensor(name: str, value: Tensor) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["arrays"] = ArrayRecord({**content["arrays"].to_torch_state_dict(), name: value})

    return change


def drop_tensor(content: RecordDict) -> None:
    state = content["arrays"].to_torch_state_dict()
    state.pop(KEY)
    content["arrays"] = ArrayRecord(state)


def data(content: bytes) -> Callable[[RecordDict], None]:
    """An array whose bytes are not what numpy writes."""
    array = Array(dtype="float32", shape=(2, 8), stype="numpy.ndarray", data=content)
    return lambda record: record["arrays"].update({KEY: array})


def header(shape: tuple[int, ...]) -> bytes:
    """Of a numpy file that announces numbers and holds none."""
    stream = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def field(record: str, name: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content[record].update({name: value})


def without(record: str, name: str = "") -> Callable[[RecordDict], None]:
    return lambda content: content[record].pop(name) if name else content.pop(record)


def number(value: float) -> Tensor:
    bad = torch.zeros(2, 8)
    bad[1, 7] = value
    return bad


def scaled(content: RecordDict, factor: float) -> None:
    state = content["arrays"].to_torch_state_dict()
    content["arrays"] = ArrayRecord({name: value * factor for name, value in state.items()})


def array(value: np.ndarray[Any, Any], **claims: Any) -> Callable[[RecordDict], None]:
    """An array as numpy writes it, pickled if need be, whatever the record says that it is."""
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=True)
    said = {"dtype": "float32", "shape": (2, 8), "stype": "numpy.ndarray", **claims}
    return lambda record: record["arrays"].update({KEY: Array(data=stream.getvalue(), **said)})


NOVEL = "x" * 5_000_000

BAD = {
    "no numbers": (tensor(KEY, torch.zeros(0, 8)), r"shape \(0, 8\), the plan says \(2, 8\)"),
    "one number": (tensor(KEY, torch.tensor(1.0)), r"shape \(\), the plan says"),
    "one more axis": (tensor(KEY, torch.zeros(2, 8, 1)), r"shape \(2, 8, 1\), the plan says"),
    "far too many": (tensor(KEY, torch.zeros(2, 800_000)), r"shape \(2, 800000\), the plan says"),
    "truth values": (tensor(KEY, torch.zeros(2, 8, dtype=torch.bool)), "holds torch.bool"),
    "complex numbers": (tensor(KEY, torch.zeros(2, 8, dtype=torch.complex64)), "holds torch.complex64"),
    "pickled objects": (array(np.array([[print] * 8] * 2, dtype=object)), "the arrays cannot be read"),
    "texts": (array(np.array([["a"] * 8] * 2)), "the arrays cannot be read"),
    "records": (array(np.zeros((2, 8), dtype=[("a", "f4")])), "the arrays cannot be read"),
    "another library": (array(np.zeros((2, 8)), stype="torch.Tensor"), "the arrays cannot be read"),
    "a shape that is a lie": (array(np.zeros((3, 8))), r"shape \(3, 8\), the plan says \(2, 8\)"),
    "a kind that is a lie": (array(np.zeros((2, 8), dtype="i8")), "holds torch.int64"),
    "a novel for a name": (tensor(NOVEL, torch.zeros(1)), "tensor x+.*"),
    "a novel for a form": (field("who", "form", NOVEL), "sent in the form 'x+"),
    "a list for a user": (field("who", "user", ["bob", "alice"]), "says it is from"),
    "bytes for a plan": (field("who", "plan-hash", b"p" * 64), "trained on plan b'ppp"),
    "a negative loss": (
        field("metrics", "emulator-loss", -5.0),
        "metric emulator-loss is -5.0, expected a number",
    ),
    "a loss of lists": (field("metrics", "emulator-loss", [1.0] * 100_000), "metric emulator-loss is"),
    "a loss beyond all": (field("metrics", "emulator-loss", 2e4), "metric emulator-loss is 20000.0"),
    "NaN": (tensor(KEY, number(math.nan)), "holds NaN or Inf"),
    "Inf": (tensor(KEY, number(-math.inf)), "holds NaN or Inf"),
    "wrong shape": (tensor(KEY, torch.zeros(3, 8)), r"shape \(3, 8\), the plan says \(2, 8\)"),
    "integers": (tensor(KEY, torch.zeros(2, 8, dtype=torch.int64)), "holds torch.int64"),
    "missing tensor": (drop_tensor, "is missing"),
    "unknown tensor": (
        tensor("model.layers.4.q_proj.lora_A.weight", torch.zeros(2, 5)),
        "not part of the plan",
    ),
    "too large for float32": (tensor(KEY, number(1.0).double() * 1e300), "holds NaN or Inf"),
    "garbage": (data(b"not an array"), "the arrays cannot be read"),
    "no bytes": (data(b""), "the arrays cannot be read"),
    "a broken zip": (data(b"PK\x03\x04 and no more"), "the arrays cannot be read"),
    "a broken header": (data(b"\x93NUMPY\x01\x00\x04\x00{{{{"), "the arrays cannot be read"),
    "more than memory holds": (data(header((10**15,))), "the arrays cannot be read"),
    "more than can be counted": (data(header((10**30,))), "the arrays cannot be read"),
    "no form": (without("who", "form"), "sent in the form None, allowed here: float32"),
    "unknown form": (field("who", "form", "int8"), "sent in the form 'int8', allowed here: float32"),
    "wrong plan": (field("who", "plan-hash", "q" * 64), "trained on plan qqqqqqqqqqqq, ours is pppppppppppp"),
    "no plan": (without("who", "plan-hash"), "trained on plan None"),
    "wrong user": (field("who", "user", "alice"), "says it is from 'alice'"),
    "no user": (without("who", "user"), "says it is from None"),
    "no who": (without("who"), "the reply holds arrays, metrics; expected arrays, metrics, who"),
    "no arrays": (without("arrays"), "the reply holds metrics, who"),
    "no metrics": (without("metrics"), "the reply holds arrays, who"),
    "two array records": (
        lambda content: content.update(more=ArrayRecord()),
        "the reply holds arrays, metrics, more",
    ),
    "other kind": (lambda content: content.update(arrays=ConfigRecord()), "the reply holds"),
    "metric missing": (without("metrics", "emulator-loss"), "metrics are"),
    "metric unknown": (field("metrics", "mood", 1.0), "metrics are .*mood"),
    "metric NaN": (field("metrics", "train-loss-last", math.nan), "metric train-loss-last is nan"),
    "metric list": (field("metrics", "train-loss-last", [1.0]), "metric train-loss-last is"),
    "no weight": (field("metrics", "num-examples", 0), "metric num-examples is 0, expected at least 1"),
    "negative weight": (field("metrics", "num-examples", -50), "metric num-examples is -50"),
    "infinite weight": (field("metrics", "num-examples", math.inf), "metric num-examples is inf"),
    "huge weight": (
        field("metrics", "num-examples", 10**12),
        "num-examples is 1000000000000, .* at most 1000000",
    ),
    "half an example": (
        field("metrics", "num-examples", 7.5),
        "metric num-examples is 7.5, .*a whole number",
    ),
    "huge loss": (field("metrics", "train-loss-last", 1e308), "metric train-loss-last is 1e.308"),
    "factors x1e3": (lambda content: scaled(content, 1e3), "the median of the round is"),
    "factors x-50": (lambda content: scaled(content, -50.0), "federation.max_update = 10 allows"),
    "an infinite product": (lambda content: scaled(content, 1e20), "product B @ A may be infinite"),
}


@pytest.mark.parametrize("mode", ["shared", "personal"])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(fault: str, mode: str) -> None:
    change, reason = BAD[fault]
    server = Server(last_round=1 if mode == "personal" else 2)
    replies = answer(server.ask())
    change(replies[1].content)
    arrays, metrics = server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert list(log.refused) == ["bob"]
    assert log.refused["bob"].startswith("bob: ")
    assert re.search(reason, log.refused["bob"]), log.refused["bob"]
    assert sorted(log.accepted) == ["alice", "carol"]
    assert metrics is not None and math.isfinite(log.train_loss)
    if mode == "shared":
        assert_mean(arrays, ["alice", "carol"])
    else:
        assert server.kept.keys() == {"alice", "carol"}


def test_a_client_that_failed_and_one_that_is_silent_are_named() -> None:
    server = Server()
    messages = server.ask()
    failed = Message(Error(code=1, reason="out of memory"), reply_to=messages[1])
    arrays, _ = server.strategy.aggregate_train(1, [*answer(messages[:1]), failed])
    assert_mean(arrays, ["alice"])
    assert server.strategy.logs[0].refused == {
        "bob": "bob: the client failed: out of memory",
        "carol": "carol: no answer in time",
    }


def test_a_round_in_which_nobody_is_good_gives_no_mean() -> None:
    server = Server()
    server.ask()
    assert server.strategy.aggregate_train(1, []) == (None, None)
    assert server.strategy.logs[0].refused.keys() == set(NODES.values())


@pytest.mark.parametrize("factor", [0.0, 1e-30, 0.2, 5.0])
def test_a_change_within_the_limit_is_averaged_however_small(factor: float) -> None:
    server = Server()
    replies = answer(server.ask())
    scaled(replies[1].content, factor)
    arrays, _ = server.strategy.aggregate_train(1, replies)
    assert arrays is not None and not server.strategy.logs[0].refused
    assert sorted(server.strategy.logs[0].accepted) == ["alice", "bob", "carol"]


def test_a_user_weighs_no_more_than_they_said_at_hello() -> None:
    agreement = dataclasses.replace(AGREEMENT, examples={"alice": 30, "bob": 9, "carol": 60})
    server = Server(agreement=agreement)
    arrays, _ = server.strategy.aggregate_train(1, answer(server.ask()))
    assert "num-examples is 10, expected at least 1 and at most 9" in server.strategy.logs[0].refused["bob"]
    assert_mean(arrays, ["alice", "carol"])


def test_one_who_moves_is_no_outlier_where_nobody_else_does() -> None:
    """The median of a round in which most sent back what they got is zero; that is no reason to refuse."""
    server = Server()
    messages = server.ask()
    replies = answer(messages)
    for reply in (replies[0], replies[2]):
        reply.content["arrays"] = ArrayRecord(wire.to_state(make_adapter(0)))
    nudged = {name: value * 1.0001 for name, value in wire.to_state(make_adapter(0)).items()}
    replies[1].content["arrays"] = ArrayRecord(nudged)
    server.strategy.aggregate_train(1, replies)
    assert not server.strategy.logs[0].refused
