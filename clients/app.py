"""The Flower ClientApp: one user's side. Messages in, one call into the workbench, messages out.

Text is read here and stays here; what leaves is LoRA factors and numbers. A simulated client is the user
that the server says it is; a real one is named by the node that runs it
(`--node-config 'user-id="alice" data-source="/home/alice/notes.jsonl"'`), never by the server. What is a
user's own between rounds lies in the node's `state-dir`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients import basis, cores
from clients.evaluation import measure
from clients.limit import within_its_time
from clients.packing import Parcel, pack
from clients.turn import Asked, Turn
from clients.workbench import UserStates, Workbench, workbench
from soppu import config as configuration
from soppu import user_ids
from soppu.adapter import LoraAdapter
from soppu.config import Config, FederationConfig
from soppu.data import load_user
from soppu.errors import FederationError
from soppu.federation import wire
from soppu.federation.basis_cache import BasisCache
from soppu.federation.emulator import LayerPlan
from soppu.federation.own_part import OwnPart
from soppu.federation.personalise import SearchOptions, personalise
from soppu.federation.train import Training, TrainOptions, fit, mean_loss

app = ClientApp(mods=[within_its_time])


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
    bench, shared = _set_up(msg, config)
    mode, number = str(order["mode"]), int(str(order["server-round"]))
    asked = Asked(number, mode == "personal", str(order.get("run", "")))
    turn = Turn(bench, asked, shared, user_id=user_id)
    states = bench.states(user_id)
    trained = _trained(bench, states, turn, _seed(config, user_id, number))
    turn.remember(trained.adapter)
    trained = _released(bench, states, turn, trained)
    personal, loss = asked.personal and turn.trains, trained.losses["emulator-loss"]
    parcel = pack(bench, states, trained.adapter, loss=loss, personal=personal)
    who = {"user": user_id, "plan-hash": bench.plan.hash, "form": parcel.form}
    content = RecordDict(
        {
            "arrays": ArrayRecord(turn.sent(parcel.state)),
            "metrics": _metrics(states, trained, parcel),
            "who": ConfigRecord({**who, **turn.told}),
        }
    )
    return Message(content=content, reply_to=msg)


@app.query("basis")
def has_basis(msg: Message, context: Context) -> Message:
    """Say whether the basis that the server names is on this node's disk, whole."""
    config = _here(msg, context)
    found = BasisCache(config.federation.client_state).find(str(msg.content["config"]["basis"]))
    return Message(content=RecordDict({"basis": ConfigRecord({"has": found is not None})}), reply_to=msg)


@app.train("cores")
def train_cores(msg: Message, context: Context) -> Message:
    """Train cores inside the basis: of this node's user, or of those a simulated node is asked for."""
    config, order = _here(msg, context), msg.content.config_records["config"]
    users = config.data.users if "user-id" in context.node_config else _named(order)
    bench, _ = _set_up(msg, config)
    cache = BasisCache(config.federation.client_state)
    told_in = cores.basis_of(msg.content, str(order["basis"]), cache)
    start = cores.start_of(bench, told_in, msg.content)
    return Message(content=cores.train(bench, users, start), reply_to=msg)


@app.train("basis")
def learn_basis(msg: Message, context: Context) -> Message:
    """Train this user's core in the basis that came, and send back where U and V should go."""
    config, user_id = _who(msg, context)
    order = msg.content.config_records["config"]
    bench, sent = _set_up(msg, config)
    asked = basis.Asked.of(order)
    given = basis.Given(
        sent,
        msg.content.array_records[basis.SHARED].to_torch_state_dict(),
        asked,
        OwnPart.of(config.federation.client_state, run=str(order.get("run", "")), user=user_id),
        _seed(config, user_id, asked.number),
    )
    learnt = basis.learn(bench, bench.states(user_id), given)
    content = RecordDict(
        {
            "arrays": ArrayRecord(learnt.state),
            "metrics": MetricRecord({**learnt.metrics}),
            "who": ConfigRecord({"user": user_id, "plan-hash": bench.plan.hash, "form": wire.FLOAT32}),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Measure the adapters that came on this user's held-out text; numbers go back."""
    config, user_id = _who(msg, context)
    bench, state = _set_up(msg, config)
    content = RecordDict(
        {
            "metrics": MetricRecord({**measure(bench, user_id, state)}),
            "who": ConfigRecord({"user": user_id, "plan-hash": bench.plan.hash}),
        }
    )
    return Message(content=content, reply_to=msg)


def _who(msg: Message, context: Context) -> tuple[Config, str]:
    """The settings as they are for this node, and the one user that it answers for."""
    config, node = _here(msg, context), context.node_config
    if "user-id" in node:
        return config, config.data.users[0]
    if not (user := str(msg.content["config"].get("user", ""))):
        raise FederationError(f"partition {node['partition-id']} is nobody's: the message names no user")
    return config, user


def _named(order: ConfigRecord) -> tuple[str, ...]:
    """The users a simulated node is asked for."""
    users = order.get("users")
    if not isinstance(users, list) or not users:
        raise FederationError("the message names no users")
    return tuple(map(str, users))


def _here(msg: Message, context: Context) -> Config:
    """The settings that came, with this node's own data and cache in place of the server's ideas."""
    config = configuration.from_dict(json.loads(str(msg.content["config"]["settings"])), source="server")
    node = context.node_config
    if "user-id" in node:
        if "data-source" not in node:
            raise FederationError(f"node of user {node['user-id']!r}: --node-config names no data-source")
        user = user_ids.to_id(str(node["user-id"]))
        data = dataclasses.replace(config.data, source=str(node["data-source"]), users=(user,))
        model, cache = node.get("base-model", config.base.model), node.get("model-cache", config.base.cache)
        base = dataclasses.replace(config.base, model=str(model), cache=str(cache))
        # the server's folder is another machine's, and it does not know this one's devices
        state = str(node.get("state-dir", FederationConfig().client_state))
        device = str(node.get("device", "auto"))
        federation = dataclasses.replace(config.federation, client_state=state, client_device=device)
        return dataclasses.replace(config, data=data, base=base, federation=federation)
    if "partition-id" not in node:
        raise FederationError(
            "this node names no user: start it with --node-config 'user-id=… data-source=…'"
        )
    return config


def _set_up(msg: Message, config: Config) -> tuple[Workbench, dict[str, Tensor]]:
    """The workbench, aligned by the emulator's LoRA that came, and the other tensors that came with it."""
    torch.set_num_threads(config.federation.client_cpus)
    state, emulator_lora = wire.split_state(msg.content.array_records["arrays"].to_torch_state_dict())
    bench = workbench(config, _plan(msg))
    bench.align(wire.loose_from_state(emulator_lora, base_hash=bench.plan.base_hash))
    return bench, state


def _plan(msg: Message) -> LayerPlan:
    return LayerPlan.from_json(str(msg.content["config"]["plan"]))


@dataclass(frozen=True, eq=False)
class _Trained:
    """An adapter, and what is told of it: losses on validation text, and how it was made."""

    adapter: LoraAdapter
    train_losses: tuple[float, float]  # at the first and the last step
    losses: dict[str, float]
    choice: dict[str, float | int]


def _trained(bench: Workbench, states: UserStates, turn: Turn, seed: int) -> _Trained:
    """What the turn's training gives; the start itself where the mode trains nobody alone."""
    if turn.trains:
        return (_personal if turn.asked.personal else _shared)(bench, states, turn, seed)
    train_loss = mean_loss(bench.top, bench.plan, states.train, adapter=turn.start)
    base, shared = (bench.validation_loss(states, adapter) for adapter in (None, turn.start))
    losses = {"emulator-loss-base": base, "emulator-loss-shared": shared, "emulator-loss": shared}
    choice = {"learning-rate": 0.0, "steps": 0, "share": 0.0}
    return _Trained(turn.start, (train_loss, train_loss), losses, choice)


def _released(bench: Workbench, states: UserStates, turn: Turn, trained: _Trained) -> _Trained:
    """The same as it leaves: where noise has come upon it, measured again."""
    adapter = turn.released(trained.adapter)
    if adapter is trained.adapter:
        return trained
    losses = {**trained.losses, "emulator-loss": bench.validation_loss(states, adapter)}
    return dataclasses.replace(trained, adapter=adapter, losses=losses)


def _shared(bench: Workbench, states: UserStates, turn: Turn, seed: int) -> _Trained:
    """What this user adds to the adapter that all share."""
    federation = bench.config.federation
    options = TrainOptions.of(bench.config, learning_rate=federation.learning_rate, seed=seed)
    result = fit(
        bench.top,
        bench.plan,
        states.train,
        start=turn.start,
        options=dataclasses.replace(options, steps=federation.local_steps, held=turn.held),
    )
    looked_at = {
        "emulator-loss-base": None,
        "emulator-loss-shared": turn.start,
        "emulator-loss": result.adapter,
    }
    losses = {name: bench.validation_loss(states, adapter) for name, adapter in looked_at.items()}
    return _Trained(result.adapter, (result.first_loss, result.last_loss), losses, {})


def _personal(bench: Workbench, states: UserStates, turn: Turn, seed: int) -> _Trained:
    """This user's own adapter, the best of what is tried on their validation text."""
    search = SearchOptions.of(bench.config.federation)
    if turn.sharing.remembers:  # a part of the start is the user's own already: the start is one of theirs
        search = dataclasses.replace(search, shares=(0.0, *search.shares))

    def begin(rate: float) -> Training[LoraAdapter]:
        options = TrainOptions.of(bench.config, learning_rate=rate, seed=seed)
        options = dataclasses.replace(options, held=turn.held)
        return Training(bench.top, bench.plan, states.train, start=turn.start, options=options)

    best = personalise(begin, partial(bench.validation_loss, states), start=turn.start, search=search)
    common = turn.common()
    losses = {
        "emulator-loss-base": best.base,
        "emulator-loss-shared": best.shared if common is None else bench.validation_loss(states, common),
        "emulator-loss": best.personal,
    }
    choice = {"learning-rate": best.learning_rate, "steps": best.steps, "share": best.share}
    return _Trained(best.adapter, (best.first_loss, best.last_loss), losses, choice)


def _seed(config: Config, user_id: str, server_round: int) -> int:
    text = f"{config.seed} {user_id} {server_round}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _metrics(states: UserStates, trained: _Trained, parcel: Parcel) -> MetricRecord:
    first, last = trained.train_losses
    told = {"num-examples": len(states.user.train), "train-loss-first": first, "train-loss-last": last}
    ternary = {} if parcel.ternary_loss is None else {"emulator-loss-ternary": parcel.ternary_loss}
    return MetricRecord({**told, **trained.losses, **trained.choice, **ternary})
