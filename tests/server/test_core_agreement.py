"""What a core has to be that comes back: everything else is refused by name, and costs nobody else theirs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from server.agreement import PERSONAL_METRICS, Agreement
from server.core_agreement import CoreAgreement
from server.core_round import CoreLog, CoreRound
from server.core_waves import Waves
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter
from soppu.errors import AdapterError
from soppu.federation import wire_core
from soppu.federation.attach import initial_pairs

pytestmark = pytest.mark.usefixtures("flower_identity")

SHAPES = {"model.layers.6.q_proj": (6, 5), "model.layers.7.down_proj": (3, 8)}
USERS = ("alice", "bob", "carol")


def a_basis() -> CoreBasis:
    draw = torch.Generator().manual_seed(0)
    sides = {
        name: (torch.randn(o, 2, generator=draw), torch.randn(i, 2, generator=draw))
        for name, (o, i) in SHAPES.items()
    }
    return CoreBasis(sides, "tiny", "b" * 64)


def an_agreement(*, own_rank: int = 0) -> CoreAgreement:
    basis = a_basis()
    core = dataclasses.replace(
        cores.zero(basis), cores={name: torch.eye(2) for name in basis.sides}, own=an_own(basis, own_rank)
    )
    whole = Agreement("p" * 64, SHAPES, 2, "tiny", "b" * 64, False, max_examples=50)
    return CoreAgreement(whole, basis, own_rank, core, wire_core.to_state(core))


def an_own(basis: CoreBasis, rank: int) -> dict[str, Any]:
    return initial_pairs(basis.module_shapes(), rank=rank, seed=0) if rank else {}


def records(agreed: CoreAgreement, user: str, *, moved: float = 0.1) -> dict[str, Any]:
    """The three records of a user as they should be."""
    told = {name: 1.5 for name in PERSONAL_METRICS} | {"num-examples": 10}
    who = {"user": user, "plan-hash": "p" * 64, "form": "core", "basis": agreed.basis.id}
    state = {name: tensor + moved for name, tensor in agreed.start.items()}
    made = (ArrayRecord(state), MetricRecord(told), ConfigRecord(who))
    return dict(zip((f"arrays:{user}", f"metrics:{user}", f"who:{user}"), made, strict=True))


def reply(content: dict[str, Any]) -> Message:
    asked = Message(RecordDict({}), dst_node_id=1, message_type="train.cores")
    return Message(RecordDict(content), reply_to=asked)


def with_nan(numbers: Tensor) -> Tensor:
    return numbers.index_fill(0, torch.tensor([3]), math.nan)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_nan, "core.numbers: holds NaN or Inf"),
        (lambda numbers: numbers[:-1], "torch.float32 (7,), the basis says torch.float32 (8,)"),
        (lambda numbers: numbers.double(), "torch.float64 (8,), the basis says torch.float32"),
        (lambda numbers: numbers + 1e38, "may be infinite"),
    ],
)
def test_numbers_that_are_not_as_agreed_are_refused(change: Callable[[Tensor], Tensor], why: str) -> None:
    agreed = an_agreement()
    content = records(agreed, "bob")
    numbers = content["arrays:bob"].to_torch_state_dict()[wire_core.NUMBERS]
    content["arrays:bob"] = ArrayRecord({wire_core.NUMBERS: change(numbers)})
    with pytest.raises(AdapterError) as caught:
        agreed.read(reply(content), "bob")
    assert str(caught.value).startswith("bob: ") and why in str(caught.value)


@pytest.mark.parametrize(
    ("record", "put", "why"),
    [
        ("arrays", ArrayRecord({"x": torch.zeros(8)}), "a core of x; expected core.numbers"),
        ("who", {"basis": "u-0123456789abcdef"}, "says basis 'u-0123456789abcdef', agreed: 'u-"),
        ("who", {"user": "alice"}, "says user 'alice', agreed: 'bob'"),
        ("who", {"form": "float32"}, "says form 'float32', agreed: 'core'"),
        ("who", {"plan-hash": "q" * 64}, "says plan-hash"),
        ("metrics", {"num-examples": 51}, "at most 50"),
        ("metrics", {"emulator-loss": math.inf}, "metric emulator-loss is inf"),
        ("metrics", {"more": 1.0}, "metrics are "),
        ("metrics", None, "expected arrays, metrics, who of this user"),
    ],
)
def test_a_reply_that_says_other_things_is_refused(record: str, put: Any, why: str) -> None:
    agreed = an_agreement()
    content = records(agreed, "bob")
    held = content.pop(f"{record}:bob")
    if put is not None:
        content[f"{record}:bob"] = type(held)({**held, **put}) if isinstance(put, dict) else put
    with pytest.raises(AdapterError) as caught:
        agreed.read(reply(content), "bob")
    assert "bob: " in str(caught.value) and why in str(caught.value)


def test_a_client_that_fails_or_cannot_train_is_told_of_by_its_own_words() -> None:
    agreed = an_agreement()
    refused = reply({"refused:bob": ConfigRecord({"why": "too little text " * 99})})
    with pytest.raises(AdapterError, match=r"bob: the client could not train: too little.*\.\.\.$"):
        agreed.read(refused, "bob")
    asked = Message(RecordDict({}), dst_node_id=1, message_type="train.cores")
    with pytest.raises(AdapterError, match="bob: the client failed: out of memory"):
        agreed.read(Message(Error(code=1, reason="out of memory"), reply_to=asked), "bob")


@pytest.mark.parametrize("own_rank", [0, 1])
def test_what_is_as_agreed_is_read_with_what_it_cost(own_rank: int) -> None:
    agreed = an_agreement(own_rank=own_rank)
    content = records(agreed, "bob", moved=0.5)
    answer = agreed.read(reply(content), "bob")
    count = wire_core.numbers(agreed.basis, own_rank=own_rank)
    assert count == 8 + own_rank * (6 + 5 + 3 + 8) == answer.placed.core.parameters()
    assert answer.change == pytest.approx(0.5 * count**0.5)
    assert answer.bytes_up == sum(record.count_bytes() for record in content.values()) > 4 * count
    assert torch.equal(
        wire_core.to_state(answer.placed.core)[wire_core.NUMBERS],
        agreed.start[wire_core.NUMBERS] + 0.5,
    )


def test_one_who_goes_too_far_is_refused_and_losses_are_means_by_examples() -> None:
    agreed, kept = an_agreement(), dict[str, CoreAdapter]()
    log = CoreLog(3, "personal")
    round_ = CoreRound(
        agreed,
        ArrayRecord({}),
        ArrayRecord(dict(agreed.start)),
        ConfigRecord({"settings": "{}"}),
        b"the basis",
        log,
        lambda user, core, metrics: kept.update({user: core}),
    )
    message = round_.message(7, USERS, basis=True)
    assert message.metadata.message_type == "train.cores" and message.content["basis"]["file"] == b"the basis"
    assert log.bytes_basis == len(b"the basis") + len("file") < log.bytes_down
    content: dict[str, Any] = {}
    for user, moved, examples in zip(USERS, (0.1, 5.0, 0.2), (10, 10, 30), strict=True):
        content |= records(agreed, user, moved=moved)
        content[f"metrics:{user}"]["num-examples"] = examples
        content[f"metrics:{user}"]["emulator-loss"] = float(examples)
    round_.read({USERS: reply(content)})
    assert kept.keys() == {"alice", "carol"} == set(log.accepted) == set(log.received) == set(log.changes)
    assert "federation.max_update = 10 allows" in log.refused["bob"]
    assert log.emulator_loss == pytest.approx((10 * 10 + 30 * 30) / 40) and log.examples == 40
    assert CoreLog.of(dataclasses.asdict(log)) == log


def test_waves_deal_out_everybody_once_and_those_of_a_crash_once_more() -> None:
    waves = Waves([f"u{n}" for n in range(7)], together=2)
    assert waves.next([1, 2]) == {1: ("u0", "u1"), 2: ("u2", "u3")}
    assert waves.next([1, 2]) == {1: ("u4", "u5"), 2: ("u6",)}
    assert waves.failed(("u0", "u1")) == () and waves.failed(("u6",)) == ("u6",)
    assert waves.next([1]) == {1: ("u0",)} and waves.next([1]) == {1: ("u1",)} and waves.next([1]) == {}
    assert Waves(["u0"], together=2).next([]) == {}
    own = Waves(["u0", "u1"], together=2, nodes={5: "u1", 6: "u7"})
    assert own.next([5]) == {5: ("u1",)} and own.next([5]) == {}
