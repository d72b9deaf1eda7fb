"""The Flower ClientApp: one user's side. Messages in, one call into the workbench, messages out.

Text is read here and stays here; what leaves is LoRA factors and numbers. A simulated client's user is
the one its partition number points at; a real one is named by the node that runs it
(`--node-config 'user-id="alice" data-source="/home/alice/notes.jsonl"'`), never by the server.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.packing import Parcel, pack
from clients.workbench import UserStates, Workbench, workbench
from soppu import config as configuration
from soppu.config import Config
from soppu.data import list_users, load_user
from soppu.errors import FederationError
from soppu.evaluate.losses import mean_loss
from soppu.federation import wire
from soppu.federation.emulator import LayerPlan
from soppu.federation.train import TrainOptions, TrainResult, fit

app = ClientApp()


@app.query("hello")
def hello(msg: Message, context: Context) -> Message:
    """Say who answers here and how much there is to train on."""
    config, user_id = _who(msg, context)
    user = load_user(config.data, user_id)
    reply = ConfigRecord({"user": user_id, "plan-hash": _plan(msg).hash, "examples": len(user.train)})
    return Message(content=RecordDict({"hello": reply}), reply_to=msg)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the LoRA that came on this user's text and send it back, its form named, with the losses seen."""
    config, user_id = _who(msg, context)
    order = msg.content.config_records["config"]
    torch.set_num_threads(config.federation.client_cpus)
    shared, emulator_lora = wire.split_state(msg.content.array_records["arrays"].to_torch_state_dict())
    bench = workbench(config, _plan(msg))
    bench.align(wire.loose_from_state(emulator_lora, base_hash=bench.plan.base_hash))
    start = wire.from_state(
        shared,
        bench.shapes,
        rank=config.lora.rank,
        who="server",
        base_model=config.base.model,
        base_hash=bench.plan.base_hash,
        fan_in_fan_out=bench.plan.fan_in_fan_out,
    )
    states = bench.states(user_id)
    mode, number = str(order["mode"]), int(str(order["server-round"]))
    options = _options(config, mode=mode, seed=_seed(config, user_id, number))
    result = fit(bench.top, bench.plan, states.train, start=start, options=options)
    parcel = pack(bench, states, result.adapter, personal=mode == "personal")
    content = RecordDict(
        {
            "arrays": ArrayRecord(parcel.state),
            "metrics": _metrics(bench, states, result, parcel),
            "who": ConfigRecord({"user": user_id, "plan-hash": bench.plan.hash, "form": parcel.form}),
        }
    )
    return Message(content=content, reply_to=msg)


def _who(msg: Message, context: Context) -> tuple[Config, str]:
    """The settings that came, with this node's own data and cache in place of the server's ideas."""
    config = configuration.from_dict(json.loads(str(msg.content["config"]["settings"])), source="server")
    node = context.node_config
    if "user-id" in node:
        if "data-source" not in node:
            raise FederationError(f"node of user {node['user-id']!r}: --node-config names no data-source")
        data = dataclasses.replace(
            config.data, source=str(node["data-source"]), users=(str(node["user-id"]),)
        )
        base = dataclasses.replace(config.base, cache=str(node.get("model-cache", config.base.cache)))
        device = str(node.get("device", "auto"))  # a server does not know this machine
        federation = dataclasses.replace(config.federation, client_device=device)
        own = dataclasses.replace(config, data=data, base=base, federation=federation)
        return own, str(node["user-id"])
    if "partition-id" not in node:
        raise FederationError(
            "this node names no user: start it with --node-config 'user-id=… data-source=…'"
        )
    users, number = list_users(config.data), int(node["partition-id"])
    if number >= len(users):
        raise FederationError(f"partition {number} has no user: {config.data.source} gives {len(users)}")
    return config, users[number]


def _plan(msg: Message) -> LayerPlan:
    return LayerPlan.from_json(str(msg.content["config"]["plan"]))


def _options(config: Config, *, mode: str, seed: int) -> TrainOptions:
    federation, personal = config.federation, mode == "personal"
    return TrainOptions(
        steps=federation.personal_steps if personal else federation.local_steps,
        batch_size=federation.batch_size,
        learning_rate=federation.personal_learning_rate if personal else federation.learning_rate,
        b_ratio=config.lora.alpha / config.lora.rank,
        prox_weight=federation.prox_weight,
        seed=seed,
    )


def _seed(config: Config, user_id: str, server_round: int) -> int:
    text = f"{config.seed} {user_id} {server_round}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _metrics(bench: Workbench, states: UserStates, result: TrainResult, parcel: Parcel) -> MetricRecord:
    metrics = MetricRecord(
        {
            "num-examples": len(states.train),
            "train-loss-first": result.first_loss,
            "train-loss-last": result.last_loss,
            "emulator-loss-base": mean_loss(bench.top, bench.plan, states.heldout, adapter=None),
            "emulator-loss": parcel.loss,
        }
    )
    if parcel.ternary_loss is not None:
        metrics["emulator-loss-ternary"] = parcel.ternary_loss
    return metrics
