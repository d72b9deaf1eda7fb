"""A round of cores: users' numbers inside a basis that is sent once, trained in one pass, told to the server.

A node of a user's own trains one; a simulated node those whom the server names. What goes back are three
records a user, as if each had answered alone: "arrays:USER", "metrics:USER", "who:USER"; or "refused:USER".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from clients import privacy
from clients.workbench import UserStates, Workbench
from soppu.config import Config
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.data import load_user
from soppu.errors import DataError, FederationError
from soppu.federation import wire_core
from soppu.federation.attach import initial_pairs
from soppu.federation.basis_cache import BasisCache
from soppu.federation.personalise import Personal, SearchOptions
from soppu.federation.personalise_many import Ground, personalise_many
from soppu.federation.train import TrainOptions, mean_losses

_Metrics = dict[str, int | float | list[int] | list[float]]  # as Flower takes them
START, BASIS = "start", "basis"  # records of the server's message


def basis_of(content: RecordDict, basis_id: str, cache: BasisCache) -> CoreBasis:
    """The basis: what came with the message, or what came once before.

    Raises:
        FederationError: it did not come, and is not here; or something else came.
    """
    if BASIS in content:
        return cache.keep(basis_id, bytes(content.config_records[BASIS]["file"]))  # type: ignore[arg-type]
    if (found := cache.find(basis_id)) is None:
        raise FederationError(f"basis {basis_id} did not come, and is not in {cache.root}")
    return found


def start_of(bench: Workbench, basis: CoreBasis, content: RecordDict) -> CoreInBasis:
    """The core that came, beside it the ranks of the user's own, which all begin alike and change nothing."""
    state = content.array_records[START].to_torch_state_dict()
    placed = wire_core.from_state(state, basis, own_rank=0, who="server")
    rank = bench.config.federation.core_own_rank
    if not rank:
        return placed
    own = initial_pairs(basis.module_shapes(), rank=rank, seed=bench.config.seed)
    return replace(placed, core=replace(placed.core, own=own))


def train(bench: Workbench, users: Sequence[str], start: CoreInBasis) -> RecordDict:
    """Every user's core trained from `start` on their own text: the records of the reply."""
    texts = []
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    for user in users:
        try:
            texts.append(load_user(bench.config.data, user))
        except DataError as error:
            records[f"refused:{user}"] = ConfigRecord({"why": str(error)})
    for one in _trained(bench, bench.states_of(texts), start) if texts else ():
        who = {"user": one.user, "plan-hash": bench.plan.hash, "form": wire_core.FORM}
        records[f"arrays:{one.user}"] = ArrayRecord(one.state)
        records[f"metrics:{one.user}"] = MetricRecord(one.metrics)
        records[f"who:{one.user}"] = ConfigRecord({**who, "basis": start.basis.id})
    return RecordDict(records)


@dataclass(frozen=True, eq=False)
class _Told:
    """What leaves of one user."""

    user: str
    state: dict[str, Tensor]
    metrics: _Metrics


def _trained(bench: Workbench, states: Sequence[UserStates], start: CoreInBasis) -> list[_Told]:
    """The best core of each on their validation text, clipped and noised where that is configured."""
    ground = Ground(bench.top, bench.plan, [one.train for one in states], [one.validation for one in states])
    starts = [replace(start, who=one.user.user_id) for one in states]
    search = SearchOptions.of(bench.config.federation)
    best = personalise_many(ground, starts=starts, search=search, options=partial(_options, bench.config))
    common = start.basis.common
    packed = [wire_core.to_state(one.adapter.core, common=common) for one in best]
    losses = [one.personal for one in best]
    if bench.config.federation.noisy_users:
        begun = wire_core.to_state(start.core, common=common)
        packed = [privacy.hidden(state, begun, bench.config.federation) for state in packed]
        losses = _again(ground, packed, starts)
    return [
        _Told(one.user.user_id, state, _metrics(one, found, loss))
        for one, found, state, loss in zip(states, best, packed, losses, strict=True)
    ]


def _options(config: Config, rate: float) -> TrainOptions:
    """Equal for all users: who is trained beside whom decides nothing."""
    return TrainOptions.of(config, learning_rate=rate, seed=config.seed)


def _again(ground: Ground, packed: Sequence[dict[str, Tensor]], starts: Sequence[CoreInBasis]) -> list[float]:
    """Validation losses of cores as they leave: noise has come upon them."""
    sent = []
    for state, start in zip(packed, starts, strict=True):
        rank = next((pair.rank for pair in start.core.own.values()), 0)
        told = wire_core.from_state(state, start.basis, own_rank=rank, who=start.who, start=start.core)
        sent.append(told)
    return mean_losses(ground.top, ground.plan, ground.validation, adapters=sent)


def _metrics(one: UserStates, best: Personal[CoreInBasis], loss: float) -> _Metrics:
    return {
        "num-examples": len(one.user.train),
        "train-loss-first": best.first_loss,
        "train-loss-last": best.last_loss,
        "emulator-loss-base": best.base,
        "emulator-loss-shared": best.shared,
        "emulator-loss": loss,
        "learning-rate": best.learning_rate,
        "steps": best.steps,
        "share": best.share,
    }
