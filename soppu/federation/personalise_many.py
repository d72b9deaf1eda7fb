"""Many users' own training in the same passes: each comes to what `personalise` would find for them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.personalise import Personal, SearchOptions, Stop, between, finite
from soppu.federation.train import CachedBlock, Together, TrainOptions, mean_losses
from soppu.federation.trained import Kind


@dataclass(frozen=True, eq=False)
class Ground:
    """What some users are trained on and chosen by: of every user, their blocks behind the frozen part."""

    top: TopModel
    plan: LayerPlan
    train: Sequence[Sequence[CachedBlock]]
    validation: Sequence[Sequence[CachedBlock]]


def personalise_many(
    ground: Ground,
    *,
    starts: Sequence[Kind],
    search: SearchOptions,
    options: Callable[[float], TrainOptions],
) -> list[Personal[Kind]]:
    """Train for every user, and choose among what was tried, each by their own validation loss.

    Args:
        starts: where every user begins; see `Together`.
        options: step size -> how to train; `steps` is not read.

    Cost: as many steps as the user takes who goes on longest, of all users who still do.
    """

    def measure(adapters: Sequence[Kind] | None) -> list[float]:
        return mean_losses(ground.top, ground.plan, ground.validation, adapters=adapters)

    base, shared = measure(None), measure(starts)
    tried = []
    for rate in search.learning_rates:
        together = Together(ground.top, ground.plan, ground.train, starts=starts, options=options(rate))
        tried.append(_Search(together, measure, rate, search).ended())
    best = [min(stops, key=lambda stop: finite(stop.loss)) for stops in zip(*tried, strict=True)]
    found = {1.0: [(stop.loss, stop.adapter) for stop in best]}
    for share in search.shares:
        drawn = [between(start, stop.adapter, share) for start, stop in zip(starts, best, strict=True)]
        found[share] = list(zip(measure(drawn), drawn, strict=True))
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


class _Search(Generic[Kind]):
    """One training of all users, each of whom is over it when their own validation loss says so."""

    def __init__(
        self,
        together: Together[Kind],
        measure: Callable[[Sequence[Kind] | None], list[float]],
        rate: float,
        search: SearchOptions,
    ) -> None:
        self._together: Together[Kind] = together
        self._measure: Callable[[Sequence[Kind] | None], list[float]] = measure
        self._rate, self._search = rate, search

    def ended(self) -> list[Stop[Kind]]:
        """Where each user was best."""
        together, search, users = self._together, self._search, self._together.users
        best: dict[int, Stop[Kind]] = {}
        worse = dict.fromkeys(users, 0)
        while (left := search.steps - len(together.losses)) > 0:
            going = [user for user in users if worse[user] < search.patience]
            if not going:
                break
            together.advance(min(search.check_every, left), going)
            adapters = [together.adapter(user) for user in users]
            losses = self._measure(adapters)
            for user in going:
                if user in best and not finite(losses[user]) < finite(best[user].loss):
                    worse[user] += 1
                    continue
                worse[user] = 0
                seen = [step[user] for step in together.losses]
                best[user] = Stop(adapters[user], losses[user], self._rate, len(seen), seen[0], seen[-1])
        return [best[user] for user in users]
