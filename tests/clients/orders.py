"""What a server would say to a client's node, and the node that hears it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from soppu import config as configuration
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.federation import wire
from soppu.federation.attach import initial_pairs
from soppu.federation.emulator import LayerPlan

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


def ternary_wire(setup: Setup, **changes: Any) -> Config:
    settings = {"wire": "ternary", "wire_density": 0.5, "wire_max_loss": 9.0, **changes}
    return dataclasses.replace(
        setup.config, federation=dataclasses.replace(setup.config.federation, **settings)
    )
