"""The ClientApp: who answers, what comes back, and that the user's text is not in it."""

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
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from transformers import PreTrainedModel

from clients.app import app
from clients.workbench import workbench
from soppu import config as configuration
from soppu import data, models
from soppu.adapter import LoraAdapter
from soppu.compress.numbers import ternary
from soppu.config import Config, LoraSettings
from soppu.errors import ConfigError, DataError, FederationError
from soppu.federation import emulator, wire, wire_ternary
from soppu.federation.attach import attached, initial_pairs
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import TrainOptions, cache_states, fit, mean_loss
from tests.soppu.compress import ternary_measures as measures

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")

SECTIONS = ("seed", "frozen_dtype", "compute_dtype", "base", "data", "plan", "lora", "federation")
USERS = {"alice": 14, "bob": 13}


@dataclasses.dataclass
class Setup:
    """What a server would say, and a way to say it."""

    config: Config
    plan: LayerPlan
    shapes: dict[str, tuple[int, int]]
    emulator: LoraAdapter

    def message(self, kind: str, config: Config | None = None, **order: Any) -> Message:
        settings = configuration.to_dict(config or self.config)
        told = {name: settings[name] for name in SECTIONS}
        order = {"settings": json.dumps(told), "plan": self.plan.to_json(), "user": "alice", **order}
        record = ConfigRecord({name: value for name, value in order.items() if value is not None})
        content = RecordDict({"config": record})
        if kind == "train":
            state = {**wire.to_state(self.start()), **wire.to_state(self.emulator, prefix=wire.EMULATOR)}
            content["arrays"] = ArrayRecord(state)
        return Message(content=content, dst_node_id=7, message_type=kind)

    def train(self, mode: str = "shared", config: Config | None = None) -> Message:
        return self.message("train", config, **{"server-round": 1, "mode": mode})

    def start(self) -> LoraAdapter:
        pairs = initial_pairs(self.shapes, rank=self.config.lora.rank, seed=0)
        return LoraAdapter(pairs, base_hash=self.plan.base_hash)


def node(**config: Any) -> Context:
    return Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})


@pytest.fixture
def setup(
    tmp_path: Path,
    tiny_base: Path,
    tiny_llama: PreTrainedModel,
    write_users: Callable[[Path, Mapping[str, int]], Path],
) -> Setup:
    source = write_users(tmp_path / "users", USERS)
    sizes = {"train_examples": 6, "validation_examples": 2, "min_examples": 4, "max_tokens": 96}
    config = configuration.from_dict(
        {
            "base": {"model": str(tiny_base)},
            "data": {"source": str(source), "users": list(USERS), **sizes},
            "lora": {"rank": 2, "alpha": 4},
            "federation": {"local_steps": 2, "personal_steps": 3, "batch_size": 2},
        }
    )
    base = models.resolve(str(tiny_base), cache=tmp_path)
    plan = emulator.make_plan(tiny_llama, base_hash=base.hash, adapter_layers=2, drop_ratio=0.34)
    inner = initial_pairs(emulator.target_shapes(tiny_llama, plan, plan.kept), rank=2, seed=1)
    for pair in inner.values():  # an aligned emulator: not the bare layers
        pair.B.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    shapes = emulator.target_shapes(tiny_llama, plan)
    return Setup(config, plan, shapes, LoraAdapter(inner, base_hash=base.hash))


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


# ---- in which form


def ternary_wire(setup: Setup, **changes: Any) -> Config:
    settings = {"wire": "ternary", "wire_density": 0.5, "wire_max_loss": 9.0, **changes}
    return dataclasses.replace(
        setup.config, federation=dataclasses.replace(setup.config.federation, **settings)
    )


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


def test_a_plan_for_another_base_model_is_refused(setup: Setup) -> None:
    setup.plan = dataclasses.replace(setup.plan, base_hash="f" * 64)
    with pytest.raises(
        FederationError, match=r"base model .* here is [0-9a-f]{12}, the plan is for ffffffffffff"
    ):
        app(setup.train(), node(**{"partition-id": 0}))


# ---- the user's text


def leaks(message: Message, user: data.UserData, ids: list[list[int]]) -> list[str]:
    """Everything of a user's text that is in the bytes a message has on the wire."""
    raw = message_to_proto(message).SerializeToString()
    for array in message.content.array_records.get("arrays", {}).values():
        raw += array.data + array.numpy().tobytes()
    found = []
    for item in (*user.train, *user.validation, *user.heldout):
        for text in (
            item.prompt,
            item.completion,
            item.digest(),
            *item.prompt.split(),
            *item.completion.split(),
        ):
            if len(text) > 8 and text.encode() in raw:
                found.append(text)
    for run in ids:
        for start in range(len(run) - 3):
            window = run[start : start + 4]
            shapes = [np.array(window, dtype=kind).tobytes() for kind in ("<i2", "<i4", "<i8", "<f4", "<f8")]
            shapes += [", ".join(map(str, window)).encode(), ",".join(map(str, window)).encode()]
            found += [str(window) for shape in shapes if shape in raw]
    return found


def test_no_text_and_no_token_of_the_user_is_in_any_reply(setup: Setup, tiny_base: Path) -> None:
    user = data.load_user(setup.config.data, "alice")
    tokenizer = models.load_tokenizer(models.resolve(str(tiny_base), cache=Path("unused")))
    blocks = data.tokenize((*user.train, *user.validation, *user.heldout), tokenizer, max_tokens=96)
    ids = [block.ids.tolist() for block in blocks]
    alice = node(**{"partition-id": 0})
    replies = [app(setup.message("query.hello"), alice)]
    replies += [app(setup.train(mode), alice) for mode in ("shared", "personal")]
    replies.append(app(setup.train("personal", ternary_wire(setup)), alice))
    assert replies[-1].content["who"]["form"] == "ternary"
    for reply in replies:
        assert leaks(reply, user, ids) == []
    # the search does find what it looks for: as text, as numbers in an array, as numbers in a list
    secret = user.train[0].completion
    replies[1].content["who"]["note"] = f"by the way: {secret}"
    assert secret in leaks(replies[1], user, ids)
    replies[2].content["arrays"] = ArrayRecord({"x": torch.tensor(ids[0], dtype=torch.float32)})
    assert str(ids[0][:4]) in leaks(replies[2], user, ids)
    replies[0].content["hello"]["tokens"] = str(ids[1])
    assert str(ids[1][:4]) in leaks(replies[0], user, ids)


def test_the_node_keeps_nothing_in_flowers_state(setup: Setup) -> None:
    context = node(**{"partition-id": 0})
    app(setup.train(), context)
    assert len(context.state) == 0


def test_errors_about_a_users_file_do_not_quote_it(setup: Setup, tmp_path: Path) -> None:
    """An error message travels to the server too."""
    lines = (tmp_path / "users" / "alice.jsonl").read_text().splitlines()
    for bad in (
        '{"user_id": "alice", "prompt": "alice-whisper-99',
        '{"user_id": "alice", "prompt": "alice-whisper-99"}',
    ):
        (tmp_path / "users" / "alice.jsonl").write_text("\n".join([*lines, bad]))
        with pytest.raises(DataError) as caught:
            app(setup.message("query.hello"), node(**{"partition-id": 0}))
        assert "alice.jsonl:15" in str(caught.value)
        assert "whisper" not in str(caught.value) and "secret" not in str(caught.value)
