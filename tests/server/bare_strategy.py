"""A strategy without a federation around it, what three users answer it, and their mean by hand."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from server.agreement import METRICS, PERSONAL_METRICS, Agreement
from server.strategy import FedBiOT
from soppu.adapter import LoraAdapter, LoraPair
from soppu.federation import wire

SHAPES = {"model.layers.6.q_proj": (6, 5), "model.layers.7.down_proj": (3, 8)}
NODES = {11: "alice", 12: "bob", 13: "carol"}
EXAMPLES = {"alice": 30, "bob": 10, "carol": 60}
SEEDS = {"alice": 1, "bob": 2, "carol": 3}
RANK = 2
KEY = "model.layers.7.down_proj.lora_A.weight"
AGREEMENT = Agreement("p" * 64, SHAPES, RANK, "tiny", "b" * 64, fan_in_fan_out=True)


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


def scaled(content: RecordDict, factor: float) -> None:
    state = content["arrays"].to_torch_state_dict()
    content["arrays"] = ArrayRecord({name: value * factor for name, value in state.items()})


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
