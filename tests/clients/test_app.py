"""The ClientApp: who answers, and what comes back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from transformers import PreTrainedModel

from clients.app import app
from clients.workbench import workbench
from soppu import data, models
from soppu.errors import ConfigError, DataError, FederationError
from soppu.federation import emulator, wire
from soppu.federation.attach import attached
from soppu.federation.emulator import TopModel
from soppu.federation.train import TrainOptions, cache_states, fit
from tests.clients.orders import USERS, Setup, node

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")


def user_in(reply: Message) -> str:
    record = "hello" if "hello" in reply.content else "who"
    return str(reply.content[record]["user"])


# ---- who answers


def test_a_simulated_node_is_the_user_that_the_server_says_it_is(setup: Setup) -> None:
    for number, user in enumerate(USERS):
        for partition in (number, 1 - number):
            message = setup.message("query.hello", user=user)
            hello = app(message, node(**{"partition-id": partition})).content["hello"]
            assert (hello["user"], hello["examples"]) == (user, 6)
            assert hello["plan-hash"] == setup.plan.hash


def test_a_simulated_node_needs_to_know_of_no_other_user(setup: Setup) -> None:
    alone = dataclasses.replace(setup.config, data=dataclasses.replace(setup.config.data, users=()))
    message = setup.message("query.hello", alone, user="bob")
    assert user_in(app(message, node(**{"partition-id": 0}))) == "bob"


def test_a_partition_without_a_user_says_so(setup: Setup) -> None:
    with pytest.raises(FederationError, match="partition 2 is nobody's: the message names no user"):
        app(setup.message("query.hello", user=None), node(**{"partition-id": 2}))


@pytest.mark.parametrize("kind", ["plain text", "chats"])
def test_text_of_other_kinds_is_trained_on_and_counted_as_hello_counts_it(
    setup: Setup, tmp_path: Path, kind: str
) -> None:
    """One example may be read in several blocks; the weight of a reply is the number that was agreed."""
    if kind == "plain text":
        source = tmp_path / "diary.txt"
        source.write_text(
            "\n\n".join(f"On day {n} we painted the boat, {'and again, ' * 30}." for n in range(40))
        )
    else:
        source = tmp_path / "chats.jsonl"
        talk = [
            ("user", "what is next"),
            ("assistant", "paint " * 40),
            ("user", "and"),
            ("assistant", "paint " * 40),
        ]
        chats = [[*talk, ("user", f"day {n}"), ("assistant", "done")] for n in range(16)]
        rows = [{"messages": [{"role": role, "content": said} for role, said in chat]} for chat in chats]
        source.write_text("\n".join(map(json.dumps, rows)))
    place = node(**{"user-id": "carol@x.org", "data-source": str(source)})
    config = dataclasses.replace(
        setup.config, data=dataclasses.replace(setup.config.data, chat_template="plain")
    )
    hello = app(setup.message("query.hello", config), place).content["hello"]
    assert (hello["user"], hello["examples"]) == ("carol%40x.org", 6)
    reply = app(setup.train("shared", config), place)
    assert user_in(reply) == "carol%40x.org"
    metrics = reply.content["metrics"]
    assert metrics["num-examples"] == hello["examples"]
    assert (
        np.isfinite(metrics["emulator-loss"])
        and metrics["train-loss-last"] < metrics["train-loss-first"] * 1.5
    )


def test_a_real_node_decides_for_itself_who_it_is_and_where_its_text_is(
    setup: Setup, tmp_path: Path, write_users: Callable[[Path, Mapping[str, int]], Path]
) -> None:
    """The server names a source and users; a node started for carol reads carol's file all the same."""
    home = write_users(tmp_path / "home", {"carol": 11})
    mine = {"user-id": "carol", "data-source": str(home / "carol.jsonl"), "partition-id": 0}
    assert user_in(app(setup.message("query.hello"), node(**mine))) == "carol"
    reply = app(setup.train(), node(**mine))
    assert user_in(reply) == "carol"
    user = data.load_user(dataclasses.replace(setup.config.data, source=str(home)), "carol")
    assert reply.content["metrics"]["num-examples"] == len(user.train)


def test_a_server_that_names_another_file_does_not_make_a_real_node_read_it(
    setup: Setup, tmp_path: Path
) -> None:
    """Not even where the server's file has a user of that name."""
    (tmp_path / "mine.jsonl").write_text("")
    mine = {"user-id": "alice", "data-source": str(tmp_path / "mine.jsonl")}
    with pytest.raises(DataError, match=r"mine\.jsonl: user without examples"):
        app(setup.message("query.hello"), node(**mine))


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({}, "this node names no user"),
        ({"user-id": "alice"}, "user 'alice': --node-config names no data-source"),
    ],
)
def test_a_node_that_is_not_set_up_says_what_is_missing(
    setup: Setup, config: dict[str, Any], fault: str
) -> None:
    with pytest.raises(FederationError, match=fault):
        app(setup.message("query.hello"), node(**config))


def test_a_user_with_too_little_text_says_so_before_training(setup: Setup) -> None:
    more = dataclasses.replace(setup.config.data, min_examples=11, train_examples=11)
    wanting = dataclasses.replace(setup.config, data=more)
    assert user_in(app(setup.message("query.hello", wanting), node(**{"partition-id": 0}))) == "alice"
    with pytest.raises(DataError, match="user 'bob' has 10 examples to train on"):
        app(setup.message("query.hello", wanting, user="bob"), node(**{"partition-id": 1}))


def test_settings_with_a_fault_are_refused(setup: Setup) -> None:
    message = setup.message("query.hello")
    message.content["config"]["settings"] = '{"lora": {"rnak": 2}}'
    with pytest.raises(ConfigError, match="server: unknown key lora.rnak"):
        app(message, node(**{"partition-id": 0}))


# ---- what comes back


@pytest.mark.parametrize("mode", ["shared", "personal"])
def test_the_reply_is_what_fit_gives_on_the_aligned_emulator(
    setup: Setup, tiny_llama: PreTrainedModel, mode: str
) -> None:
    """Written down again without workbench, files or messages."""
    reply = app(setup.train(mode), node(**{"partition-id": 0}))
    base = models.resolve(setup.config.base.model, cache=Path("unused"))
    tokenizer = models.load_tokenizer(base)
    user = data.load_user(setup.config.data, "alice")
    bottom = emulator.with_layers(tiny_llama, setup.plan.kept)
    blocks = data.tokenize(user.train, tokenizer, max_tokens=96)
    with attached(bottom, emulator.to_own(setup.emulator, setup.plan, setup.plan.kept)):
        cached = cache_states(bottom, blocks, pad_id=1)
    seed = int.from_bytes(hashlib.sha256(b"0 alice 1").digest()[:7], "big")
    steps = 3 if mode == "personal" else 2
    options = TrainOptions(steps=steps, batch_size=2, b_ratio=2.0, prox_weight=1e-3, seed=seed)
    wanted = fit(TopModel(tiny_llama, setup.plan), setup.plan, cached, start=setup.start(), options=options)
    found = reply.content["arrays"].to_torch_state_dict()
    assert found.keys() == wire.to_state(wanted.adapter).keys()
    for name, tensor in wire.to_state(wanted.adapter).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert reply.content["metrics"]["train-loss-last"] == pytest.approx(wanted.last_loss, rel=1e-4)


def test_the_same_message_gives_the_same_reply(setup: Setup) -> None:
    states = []
    for _ in range(2):
        workbench.cache_clear()
        reply = app(setup.train(), node(**{"partition-id": 0}))
        states.append(reply.content["arrays"].to_torch_state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_reply_holds_factors_of_the_adapter_layers_and_numbers_only(setup: Setup) -> None:
    reply = app(setup.train(), node(**{"partition-id": 0}))
    assert {name: type(record).__name__ for name, record in reply.content.items()} == {
        "arrays": "ArrayRecord",
        "metrics": "MetricRecord",
        "who": "ConfigRecord",
    }
    adapter = wire.from_state(
        reply.content["arrays"].to_torch_state_dict(), setup.shapes, rank=2, who="alice"
    )
    assert all(pair.B.abs().max() > 0 for pair in adapter.pairs.values())  # it has trained
    assert dict(reply.content["who"]) == {"user": "alice", "plan-hash": setup.plan.hash, "form": "float32"}
    assert set(reply.content["metrics"]) == {
        "num-examples",
        "train-loss-first",
        "train-loss-last",
        "emulator-loss-base",
        "emulator-loss-shared",
        "emulator-loss",
    }
    assert all(isinstance(value, int | float) for value in reply.content["metrics"].values())


def test_a_plan_for_another_base_model_is_refused(setup: Setup) -> None:
    setup.plan = dataclasses.replace(setup.plan, base_hash="f" * 64)
    with pytest.raises(
        FederationError, match=r"base model .* here is [0-9a-f]{12}, the plan is for ffffffffffff"
    ):
        app(setup.train(), node(**{"partition-id": 0}))
