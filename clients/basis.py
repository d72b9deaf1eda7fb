"""A round in which a basis is learnt: this user's core is trained in it, and says where U and V should go.

The core begins at nothing in the first of these rounds, goes on in the others, and never leaves. What leaves
are the gradients of U and V, added up over the steps that the core took while they stood still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from clients import privacy
from clients.workbench import UserStates, Workbench
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.federation import emulator, wire, wire_basis
from soppu.federation.attach import attached
from soppu.federation.own_part import OwnPart
from soppu.federation.train import Together, TrainOptions, mean_losses

SHARED = "shared"  # record of the server's message: the adapter that all cores are beside


@dataclass(frozen=True)
class Asked:
    """What the server asks for.

    Attributes:
        number, first: this round of the run, and the first one in which a basis is learnt.
        steps: of the core.
        rate: its AdamW step size.
    """

    number: int
    first: int
    steps: int
    rate: float

    @classmethod
    def of(cls, order: ConfigRecord) -> Asked:
        """As it came."""
        number, first, steps = (
            int(str(order[key])) for key in ("server-round", "basis-first", "basis-steps")
        )
        return cls(number, first, steps, float(str(order["core-rate"])))


@dataclass(frozen=True, eq=False)
class Given:
    """What one user's round begins with.

    Attributes:
        basis, shared: U and V, and the adapter that all share, as they came.
        memory: where the core waits between rounds.
        seed: of the order of examples.
    """

    basis: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    asked: Asked
    memory: OwnPart
    seed: int


@dataclass(frozen=True, eq=False)
class Learnt:
    """What leaves of one user, and the losses it came with."""

    state: dict[str, Tensor]
    metrics: dict[str, int | float]


def learn(bench: Workbench, states: UserStates, given: Given) -> Learnt:
    """One round on one user's text, beside the shared adapter.

    Raises:
        AdapterError: basis or adapter is of other layers than the plan's.
        FederationError: what was remembered is damaged.
    """
    plan, settings = bench.plan, bench.config.federation
    shared = wire.loose_from_state(given.shared, base_hash=plan.base_hash)
    base, common = (bench.validation_loss(states, adapter) for adapter in (None, shared))
    with attached(bench.top.model, emulator.to_own(shared, plan, plan.adapter)):
        training = _trained(bench, states, given)
        own = training.adapter(0)
        (ended,) = mean_losses(bench.top, plan, [states.validation], adapters=[own])
    given.memory.keep(given.asked.number, {n: core.contiguous() for n, core in own.core.cores.items()})
    state = wire_basis.to_state(training.basis_gradient())
    if settings.noisy_users:
        state = privacy.hidden(state, {name: torch.zeros_like(one) for name, one in state.items()}, settings)
    (first, *_), (last, *_) = training.losses[0], training.losses[-1]
    metrics = {
        "num-examples": len(states.user.train),
        "train-loss-first": first,
        "train-loss-last": last,
        "emulator-loss-base": base,
        "emulator-loss-shared": common,
        "emulator-loss": ended,
    }
    return Learnt(state, metrics)


def _trained(bench: Workbench, states: UserStates, given: Given) -> Together[CoreInBasis]:
    """This user's core, some steps further, and what these say of U and V."""
    basis = CoreBasis(wire_basis.from_state(given.basis), base_hash=bench.plan.base_hash)
    start = CoreInBasis(_core(basis, given), basis, who=states.user.user_id)
    options = TrainOptions(
        batch_size=bench.config.federation.batch_size,
        learning_rate=given.asked.rate,
        b_ratio=1.0,
        seed=given.seed,
    )
    training: Together[CoreInBasis] = Together(
        bench.top, bench.plan, [states.train], starts=[start], options=options
    )
    training.watch_basis()
    training.advance(given.asked.steps)
    return training


def _core(basis: CoreBasis, given: Given) -> CoreAdapter:
    """Where this user's core is by now: as the last of these rounds that they took part in left it."""
    since, held = given.memory.recall(before=given.asked.number)
    begun = cores.zero(basis)
    return begun if since < given.asked.first else replace(begun, cores=held)
