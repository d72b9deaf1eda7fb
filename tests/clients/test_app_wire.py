"""A ternary wire: signs and gains within the budget, float32 beyond it and in shared rounds."""

from __future__ import annotations

import dataclasses

import pytest
from flwr.app import Message

from clients.app import app
from clients.workbench import workbench
from soppu.adapter import LoraAdapter
from soppu.compress.numbers import ternary
from soppu.config import LoraSettings
from soppu.federation import wire, wire_ternary
from soppu.federation.train import mean_loss
from tests.clients.orders import Setup, node, ternary_wire
from tests.soppu.compress import ternary_measures as measures

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")


def received(setup: Setup, reply: Message) -> LoraAdapter:
    """As a server would read it."""
    form = wire_ternary.from_ternary if reply.content["who"]["form"] == "ternary" else wire.from_state
    return form(reply.content["arrays"].to_torch_state_dict(), setup.shapes, rank=2, who="alice")


def test_a_personal_adapter_within_its_budget_comes_as_signs_and_gains(setup: Setup) -> None:
    config = ternary_wire(setup)
    plain, sent = (
        app(setup.train("personal", config=one), node(**{"partition-id": 0}))
        for one in (setup.config, config)
    )
    assert (plain.content["who"]["form"], sent.content["who"]["form"]) == ("float32", "ternary")
    assert list(sent.content.array_records) == ["arrays"]
    trained = received(setup, plain)
    wanted = measures.applied(trained, ternary.fixed(trained, density=0.5))
    assert received(setup, sent).content_hash() == wanted.content_hash()
    # the two losses are those of the adapter before and of what the server decodes
    metrics = sent.content["metrics"]
    assert set(metrics) - set(plain.content["metrics"]) == {"emulator-loss-ternary"}
    assert metrics["emulator-loss"] == plain.content["metrics"]["emulator-loss"]
    bench = workbench(config, setup.plan)
    validation = bench.states("alice").validation
    full = dataclasses.replace(wanted, base_hash=setup.plan.base_hash)
    assert metrics["emulator-loss-ternary"] == mean_loss(bench.top, bench.plan, validation, adapter=full)
    assert metrics["emulator-loss-ternary"] != metrics["emulator-loss"]


def test_a_client_over_its_budget_sends_float32_and_says_so(setup: Setup) -> None:
    config = ternary_wire(setup, wire_max_loss=0.0, wire_density=1e-6)
    plain, sent = (
        app(setup.train("personal", config=one), node(**{"partition-id": 0}))
        for one in (setup.config, config)
    )
    assert sent.content["who"]["form"] == "float32"
    assert received(setup, sent).content_hash() == received(setup, plain).content_hash()
    metrics = sent.content["metrics"]
    assert metrics["emulator-loss-ternary"] > metrics["emulator-loss"]


def test_a_shared_round_is_float32_whatever_the_wire(setup: Setup) -> None:
    plain, sent = (
        app(setup.train("shared", config=one), node(**{"partition-id": 0}))
        for one in (setup.config, ternary_wire(setup))
    )
    assert sent.content["who"]["form"] == "float32"
    assert sent.content["metrics"] == plain.content["metrics"]
    assert received(setup, sent).content_hash() == received(setup, plain).content_hash()


def test_the_reply_is_many_times_smaller(setup: Setup) -> None:
    setup.config = dataclasses.replace(setup.config, lora=LoraSettings(rank=8, alpha=16.0))
    small = ternary_wire(setup, wire_density=0.2)
    plain, sent = (
        app(setup.train("personal", config=one), node(**{"partition-id": 0})) for one in (setup.config, small)
    )
    size = [sum(r.count_bytes() for r in message.content.values()) for message in (plain, sent)]
    assert sent.content["who"]["form"] == "ternary" and size[0] > 8 * size[1]
