"""The strategy: what every user is asked, the mean by hand, and everybody's own kept apart."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Message

from soppu.federation import wire
from tests.server.bare_strategy import (
    EXAMPLES,
    NODES,
    SEEDS,
    SHAPES,
    Server,
    answer,
    assert_mean,
    make_adapter,
)

pytestmark = pytest.mark.usefixtures("flower_identity")


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
