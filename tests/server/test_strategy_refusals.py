"""Every bad reply is refused by name, and the round goes on with the others."""

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
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from torch import Tensor

from soppu.federation import wire
from tests.server.bare_strategy import (
    AGREEMENT,
    KEY,
    NODES,
    Server,
    answer,
    assert_mean,
    make_adapter,
    scaled,
)

pytestmark = pytest.mark.usefixtures("flower_identity")


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
