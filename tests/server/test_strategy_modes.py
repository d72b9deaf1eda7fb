"""The strategy of a mode: its average, its clipping, and replies of another mode refused by name."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from soppu import config as configuration
from soppu.federation import wire
from soppu.federation.modes import Sharing
from soppu.sharing import SharingSettings
from tests.server import bare_strategy as unit

# other tests cover the same lines; tracing takes a third of the time
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]


def strategy(last_round: int = 2, *, mode: str = "finetune", **settings: Any) -> unit.Server:
    server = unit.Server(last_round=last_round)
    server.strategy._sharing = SharingSettings(mode=mode, **settings)  # type: ignore[arg-type]
    return server


def test_the_strategy_averages_by_the_rule_of_the_configuration() -> None:
    states = [wire.to_state(unit.make_adapter(seed)) for seed in unit.SEEDS.values()]
    server = strategy(robust="median")
    arrays, metrics = server.strategy.aggregate_train(1, unit.answer(server.ask()))
    assert arrays is not None and metrics is not None
    for name, tensor in arrays.to_torch_state_dict().items():
        middle = torch.stack([state[name] for state in states]).median(0).values
        torch.testing.assert_close(tensor, middle, rtol=1e-5, atol=1e-6)
    server = strategy(average="products")
    arrays, _ = server.strategy.aggregate_train(1, unit.answer(server.ask()))
    assert arrays is not None
    found = wire.loose_from_state(arrays.to_torch_state_dict())
    for name, pair in found.pairs.items():
        products = [unit.make_adapter(seed).pairs[name].delta() for seed in unit.SEEDS.values()]
        dense = sum(w / 100 * p for w, p in zip((30, 10, 60), products, strict=True))
        U, sizes, V = torch.linalg.svd(dense)
        torch.testing.assert_close(pair.delta(), U[:, :2] * sizes[:2] @ V[:2], rtol=1e-4, atol=1e-4)


def test_where_changes_are_clipped_a_large_one_is_not_refused_but_told() -> None:
    server = strategy(clip="median")
    replies = unit.answer(server.ask())
    unit.scaled(replies[1].content, 1e3)
    arrays, _ = server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert arrays is not None and not log.refused and sorted(log.accepted) == ["alice", "bob", "carol"]
    assert "bob" in log.clipped and log.clipped["bob"] < 0.01
    own = strategy(1, clip="median")  # of their own adapters no mean is made: there it is as ever
    replies = unit.answer(own.ask())
    unit.scaled(replies[1].content, 1e3)
    own.strategy.aggregate_train(1, replies)
    assert (
        own.kept.keys() == {"alice", "carol"} and "median of the round" in own.strategy.logs[0].refused["bob"]
    )


@pytest.mark.parametrize(
    ("mode", "personal", "sent", "fault"),
    [
        ("fedsa", False, "whole", r"tensor .*lora_B.weight is not part of the plan \(2 in all\)"),
        ("ffa", False, "whole", r"tensor .*lora_A.weight is not part of the plan \(2 in all\)"),
        ("dual", False, "whole", r"shape \(2, \d\), the plan says \(1, \d\)"),
        ("fedsa", True, "shared", r"tensor .*lora_B.weight is missing \(2 in all\)"),
        ("dual", True, "shared", r"shape \(1, \d\), the plan says \(2, \d\)"),
        ("shared", True, "whole", r"is not part of the plan \(4 in all\)"),
        ("fedsa", False, "nan", "holds NaN or Inf"),
        ("dual", True, "nan", "holds NaN or Inf"),
    ],
)
def test_a_reply_of_another_mode_is_refused_by_name(mode: str, personal: bool, sent: str, fault: str) -> None:
    """More than was agreed, or less: the round goes on with the others."""
    cut = Sharing.of(configuration.from_dict({"lora": {"rank": 2}, "federation": {"mode": mode}}))
    agreement = dataclasses.replace(unit.AGREEMENT, sharing=cut)
    server = unit.Server(last_round=1 if personal else 2, agreement=agreement)
    begun = ArrayRecord(cut.start(unit.SHAPES)[0])
    order = ConfigRecord({"settings": "{}", "plan": "{}"})
    asked = list(server.strategy.configure_train(1, begun, order, None))  # type: ignore[arg-type]
    replies = unit.answer(asked)
    for reply in replies:
        state = reply.content["arrays"].to_torch_state_dict()
        parts = {"whole": state, "shared": cut.split(state)[0]}
        right = (state if cut.trains_alone else {}) if personal else parts["shared"]
        parts["nan"] = {name: tensor * math.nan for name, tensor in right.items()}
        is_bob = reply.content["who"]["user"] == "bob"
        reply.content["arrays"] = ArrayRecord(parts[sent] if is_bob else right)
    server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert log.accepted == ["alice", "carol"] and list(log.refused) == ["bob"]
    assert re.search(f"^bob: .*{fault}", log.refused["bob"]), log.refused["bob"]
    assert server.kept.keys() == ({"alice", "carol"} if personal else set())
    if mode == "shared":  # whatever anybody says, what is stored is the average that the server sent
        kept = {name: wire.to_state(adapter) for name, adapter in server.kept.items()}
        assert all(
            torch.equal(tensor, kept["alice"][name]) for name, tensor in begun.to_torch_state_dict().items()
        )
