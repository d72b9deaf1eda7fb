"""A round in which a basis is learnt: this user's core, which nobody sees, and what it makes of U and V.

The core begins at nothing and is forgotten; U and V follow the gradient of the same losses and go back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord
from torch import Tensor

from clients import privacy
from clients.workbench import UserStates, Workbench
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.federation import emulator, wire, wire_basis
from soppu.federation.attach import attached
from soppu.federation.learn_basis import LearnOptions, episode
from soppu.federation.train import mean_loss, mean_losses

SHARED = "shared"  # record of the server's message: the adapter that all cores are beside


@dataclass(frozen=True, eq=False)
class Learnt:
    """What leaves of one user, and the losses it came with."""

    state: dict[str, Tensor]
    metrics: dict[str, int | float]


def options_of(order: ConfigRecord, *, batch_size: int, seed: int) -> LearnOptions:
    """How the server wants it learnt."""
    steps, rate, core_rate = (order[name] for name in ("basis-steps", "basis-rate", "core-rate"))
    return LearnOptions(
        steps=int(str(steps)),
        rate=float(str(rate)),
        core_rate=float(str(core_rate)),
        batch_size=batch_size,
        seed=seed,
    )


def learn(
    bench: Workbench,
    states: UserStates,
    sent: Mapping[str, Tensor],
    *,
    shared: Mapping[str, Tensor],
    options: LearnOptions,
) -> Learnt:
    """One episode on one user's text, beside the shared adapter.

    Args:
        sent: U and V as they came.
        shared: the adapter's tensors.

    Raises:
        AdapterError: either is of other layers than the plan's.
    """
    beside = wire.loose_from_state(shared, base_hash=bench.plan.base_hash)
    start = wire_basis.from_state(sent, CoreBasis({}, base_hash=bench.plan.base_hash))
    base = mean_loss(bench.top, bench.plan, states.validation, adapter=None)
    common = mean_loss(bench.top, bench.plan, states.validation, adapter=beside)
    with attached(bench.top.model, emulator.to_own(beside, bench.plan, bench.plan.adapter)):
        training = episode(bench.top, bench.plan, [states.train], start=start, options=options)
        held: list[CoreInBasis] = [training.adapter(0)]
        (own,) = mean_losses(bench.top, bench.plan, [states.validation], adapters=held)
    state = wire_basis.to_state(training.basis())
    if bench.config.federation.noisy_users:
        state = privacy.hidden(state, sent, bench.config.federation)
    losses = [loss for (loss,) in training.losses]
    metrics = {
        "num-examples": len(states.user.train),
        "train-loss-first": losses[0],
        "train-loss-last": losses[-1],
        "emulator-loss-base": base,
        "emulator-loss-shared": common,
        "emulator-loss": own,
    }
    return Learnt(state, metrics)
