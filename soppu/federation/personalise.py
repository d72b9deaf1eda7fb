"""One user's own training: how far to go, chosen on text that is neither trained on nor judged by.

Several step sizes are tried, each until the validation loss stops falling; the best is drawn back towards
the shared adapter as far as validation asks for. What is served follows from the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Self

import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.federation.train import Together, Training
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
    """Train for one user, a LoRA or a core, and choose among what was tried: `search_all` of one.

    Args:
        begin: step size -> a training from `start` that has taken no step.
        measure: an adapter's validation loss (None: the base model's), nats a token.
    """
    (found,) = search_all(
        lambda rate: begin(rate).together,
        lambda adapters: [measure(adapters[0] if adapters else None)],
        starts=[start],
        search=search,
    )
    return found


def search_all(
    begin: Callable[[float], Together[Kind]],
    measure: Callable[[Sequence[Kind] | None], list[float]],
    *,
    starts: Sequence[Kind],
    search: SearchOptions,
) -> list[Personal[Kind]]:
    """Train for users who are trained together, and choose among what was tried, each by their own loss.

    Args:
        begin: step size -> a training from `starts` that has taken no step.
        measure: validation losses of everybody's adapters (None: the base model's), nats a token.

    Cost: as many optimiser steps a step size as the user takes who goes on longest, at most `steps`, and a
    validation pass every `check_every` of them.
    """
    shared = measure(starts)
    tried = [_train(begin(rate), measure, rate=rate, search=search) for rate in search.learning_rates]
    best = [min(stops, key=lambda stop: finite(stop.loss)) for stops in zip(*tried, strict=True)]
    found = {1.0: [(stop.loss, stop.adapter) for stop in best]}
    for share in search.shares:
        drawn = [between(start, stop.adapter, share) for start, stop in zip(starts, best, strict=True)]
        found[share] = list(zip(measure(drawn), drawn, strict=True))
    base = measure(None)
    return [
        _chosen({share: each[user] for share, each in found.items()}, stop, (base[user], shared[user]))
        for user, stop in enumerate(best)
    ]


def _chosen(
    found: Mapping[float, tuple[float, Kind]], stop: Stop[Kind], told: tuple[float, float]
) -> Personal[Kind]:
    share = min(found, key=lambda share: finite(found[share][0]))
    loss, adapter = found[share]
    return Personal(
        adapter=adapter,
        base=told[0],
        shared=told[1],
        personal=loss,
        learning_rate=stop.learning_rate,
        steps=stop.steps,
        share=share,
        first_loss=stop.first_loss,
        last_loss=stop.last_loss,
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
    together: Together[Kind],
    measure: Callable[[Sequence[Kind] | None], list[float]],
    *,
    rate: float,
    search: SearchOptions,
) -> list[Stop[Kind]]:
    """Train until each user's validation loss says stop; what each was best at."""
    users = together.users
    best: dict[int, Stop[Kind]] = {}
    worse = dict.fromkeys(users, 0)
    while (left := search.steps - len(together.losses)) > 0:
        going = [user for user in users if worse[user] < search.patience]
        if not going:
            break
        together.advance(min(search.check_every, left), going)
        adapters = [together.adapter(user) for user in users]
        losses = measure(adapters)
        for user in going:
            if user in best and not finite(losses[user]) < finite(best[user].loss):
                worse[user] += 1
                continue
            worse[user] = 0
            seen = [step[user] for step in together.losses]
            best[user] = Stop(adapters[user], losses[user], rate, len(seen), seen[0], seen[-1])
    return [best[user] for user in users]
