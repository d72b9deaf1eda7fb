"""Many users' own training in the same passes: each comes to what `personalise` would find for them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.personalise import Personal, SearchOptions, search_all
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
    """

    def begin(rate: float) -> Together[Kind]:
        return Together(ground.top, ground.plan, ground.train, starts=starts, options=options(rate))

    def measure(adapters: Sequence[Kind] | None) -> list[float]:
        return mean_losses(ground.top, ground.plan, ground.validation, adapters=adapters)

    return search_all(begin, measure, starts=starts, search=search)
