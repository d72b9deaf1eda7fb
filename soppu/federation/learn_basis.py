"""A basis that is learnt through the cores trained in it, instead of taken from adapters trained without it.

What users have in common need not lie in where free adapters end: those of two users hardly overlap, and a
basis of them is little better than a random one. Here everybody in a cohort trains a core that begins at
nothing, while U and V, which all of them share, follow the gradient of the same losses. After some steps the
cores are forgotten and all begin again, so that what is learnt is a basis in which a core trains well.

Source: FedRep (Collins et al., ICML 2021): its representation is here U and V, its heads are the cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis, orthonormal
from soppu.cores.core import CoreInBasis
from soppu.federation import emulator
from soppu.federation.train import CachedBlock, Together, TrainOptions


@dataclass(frozen=True)
class LearnOptions:
    """How a basis is learnt."""

    episodes: int = 4  # each with cores that begin at nothing
    steps: int = 40  # of the optimiser, an episode
    rate: float = 1e-3  # AdamW step size of U and V, whose columns are of length 1
    core_rate: float = 0.06  # of cores
    batch_size: int = 4  # examples a step and user
    seed: int = 0  # order of the examples


def learnt(
    top: emulator.TopModel,
    plan: emulator.LayerPlan,
    blocks: Sequence[Sequence[CachedBlock]],
    *,
    start: CoreBasis,
    options: LearnOptions,
) -> Iterator[CoreBasis]:
    """The basis after every episode, orthonormal. Cost: a forward and backward pass a step, of every user.

    Args:
        top: with whatever users have beside their cores in it, a shared adapter, say.
        blocks: of every user of the cohort.
        start: whose modules and widths it has: `soppu.cores.basis.drawn` one of nobody's text, say.

    Raises:
        AdapterError: `start` is of other layers than the plan's.
    """
    basis = start
    for episode in range(options.episodes):
        placed = CoreInBasis(cores.zero(basis), basis, who="cohort")
        training = Together(
            top, plan, blocks, starts=[placed] * len(blocks), options=_training(options, episode)
        )
        training.advance(options.steps)
        basis = orthonormal(training.basis())
        yield basis


def _training(options: LearnOptions, episode: int) -> TrainOptions:
    return TrainOptions(
        batch_size=options.batch_size,
        learning_rate=options.core_rate,
        b_ratio=1.0,
        basis_rate=options.rate,
        seed=options.seed + episode,
    )
