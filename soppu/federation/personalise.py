"""One user's own training: how far to go, chosen on text that is neither trained on nor judged by.

Several step sizes are tried, each until the validation loss stops falling; the best is drawn back towards
the shared adapter as far as validation asks for. What is served follows from the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Self

import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.federation.train import Training
from soppu.federation.trained import Kind

if TYPE_CHECKING:
    from soppu.config import FederationConfig

PERSONAL, SHARED, BASE = "personal", "shared", "base"


@dataclass(frozen=True)
class SearchOptions:
    """What is tried for a user, and when it ends."""

    learning_rates: tuple[float, ...]  # each is a training of its own, from the same start
    steps: int  # at most, of one training
    check_every: int = 10  # steps between two looks at the validation loss
    patience: int = 2  # looks in a row without a better one that end a training
    shares: tuple[float, ...] = (0.5, 0.75)  # how far from the shared adapter to the trained one, beside 1

    @classmethod
    def of(cls, config: FederationConfig) -> Self:
        """What a run tries for every user."""
        return cls(
            learning_rates=config.personal_learning_rates,
            steps=config.personal_steps,
            check_every=config.personal_check_every,
            patience=config.personal_patience,
            shares=config.personal_shares,
        )


@dataclass(frozen=True, eq=False)
class Personal(Generic[Kind]):
    """What came out for a user.

    Attributes:
        adapter: the best on validation text, full-model names.
        base, shared, personal: validation losses (nats a token) without an adapter, with the one that
            training started from, and with `adapter`.
        learning_rate, steps, share: how `adapter` was made.
        first_loss, last_loss: training losses of the training it comes from, at its first and last step.
    """

    adapter: Kind
    base: float
    shared: float
    personal: float
    learning_rate: float
    steps: int
    share: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True, eq=False)
class Stop(Generic[Kind]):
    """Where one training was best."""

    adapter: Kind
    loss: float
    learning_rate: float
    steps: int
    first_loss: float
    last_loss: float


def served(*, base: float, shared: float, personal: float) -> str:
    """Which of the three a user is served: the lowest loss; the simpler of equals; never one not finite."""
    losses = {BASE: base, SHARED: shared, PERSONAL: personal}
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    return min(finite or losses, key=losses.__getitem__)


def personalise(
    begin: Callable[[float], Training[Kind]],
    measure: Callable[[Kind | None], float],
    *,
    start: Kind,
    search: SearchOptions,
) -> Personal[Kind]:
    """Train for one user, a LoRA or a core, and choose among what was tried.

    Args:
        begin: step size -> a training from `start` that has taken no step.
        measure: an adapter's validation loss (None: the base model's), nats a token.

    Cost: at most `steps` optimiser steps a step size, and a validation pass every `check_every` of them.
    """
    shared = measure(start)
    stops = [_train(begin(rate), measure, rate=rate, search=search) for rate in search.learning_rates]
    best = min(stops, key=lambda stop: finite(stop.loss))
    drawn = {share: between(start, best.adapter, share) for share in search.shares}
    losses = {1.0: best.loss, **{share: measure(adapter) for share, adapter in drawn.items()}}
    share = min(losses, key=lambda share: finite(losses[share]))
    return Personal(
        adapter=drawn.get(share, best.adapter),
        base=measure(None),
        shared=shared,
        personal=losses[share],
        learning_rate=best.learning_rate,
        steps=best.steps,
        share=share,
        first_loss=best.first_loss,
        last_loss=best.last_loss,
    )


def finite(loss: float) -> float:
    """What a loss is compared by: one that is NaN is the worst there is, and not the least."""
    return loss if math.isfinite(loss) else math.inf


def between(start: Kind, end: Kind, share: float) -> Kind:
    """What lies a share of the way from one to the other, factor by factor: of the same rank."""
    if isinstance(start, LoraAdapter):
        return replace(end, pairs=_drawn(start.pairs, end.pairs, share))
    old, new = start.core, end.core
    cores = {name: torch.lerp(core, new.cores[name], share) for name, core in old.cores.items()}
    return replace(end, core=replace(new, cores=cores, own=_drawn(old.own, new.own, share)))


def _drawn(old: Mapping[str, LoraPair], new: Mapping[str, LoraPair], share: float) -> dict[str, LoraPair]:
    return {
        name: LoraPair(pair.A + share * (new[name].A - pair.A), pair.B + share * (new[name].B - pair.B))
        for name, pair in old.items()
    }


def _train(
    training: Training[Kind],
    measure: Callable[[Kind | None], float],
    *,
    rate: float,
    search: SearchOptions,
) -> Stop[Kind]:
    """Train until validation says stop; what it was best at."""
    best: Stop[Kind] | None = None
    worse = 0
    while (left := search.steps - len(training.losses)) > 0 and worse < search.patience:
        training.advance(min(search.check_every, left))
        adapter = training.adapter()
        loss = measure(adapter)
        if best is not None and not finite(loss) < finite(best.loss):
            worse += 1
            continue
        losses, worse = training.losses, 0
        best = Stop(adapter, loss, rate, len(losses), losses[0], losses[-1])
    assert best is not None  # at least one step is taken
    return best
