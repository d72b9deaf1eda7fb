"""Bases that are learnt through the cohort's cores: with its text in one place, or where the text is.

Both begin with random directions and go on for as long as is best for whom step sizes are chosen on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import click

from benchmarks.personal_ground import Ground
from benchmarks.personal_users import Person
from benchmarks.personal_ways import B_RATIO, BATCH, Blocks, InLoop, of_core
from soppu.cores import basis_file
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis, orthonormal
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.federation import learn_basis
from soppu.federation.basis_adam import BasisAdam
from soppu.federation.learn_basis import LearnOptions
from soppu.federation.train import Together, TrainOptions

LEARN: Mapping[str, Any] = {"episodes": 4, "steps": 40, "rate": 1e-3, "core_rate": 0.06}
ROUNDS: Mapping[str, Any] = {"rounds": 16, "episode": 8, "steps": 5, "rate": 5e-3, "core_rate": 0.06}
_MARKS = (30, 45, 60)  # steps after which cores in a basis are looked at
_AT_ONCE = 8  # users in one pass


def learnt(ground: Ground, k: int, modules: Sequence[str], users: int) -> CoreBasis:
    """Through cores of the first users of the basis, beside the shared adapter, their text in one place."""

    def episodes(texts: Sequence[Blocks]) -> Iterable[CoreBasis]:
        options, top = LearnOptions(**LEARN, seed=ground.seed, batch_size=BATCH), ground.beside.top
        start = ground.drawn(k, modules)
        return learn_basis.learnt(top, ground.base.plan, texts, start=start, options=options)

    return _kept(ground, f"{k} {modules} {users} {LEARN}", ("learnt", k, users), episodes)


def federated(ground: Ground, k: int, modules: Sequence[str], users: int) -> CoreBasis:
    """As a federation learns it: the mean of users' gradients, round by round, and Adam's steps with it."""
    told = f"{k} {modules} {users} {ROUNDS}"
    return _kept(ground, told, ("federated", k, users), partial(_episodes, ground, k, modules))


def federated_of(ground: Ground, people: Sequence[Person], k: int, modules: Sequence[str]) -> CoreBasis:
    """As `federated`, of some users of the basis."""
    told = f"{k} {modules} {[one.id for one in people]} {ROUNDS}"
    what = "federated", k, len(people)
    return _kept(ground, told, what, partial(_episodes, ground, k, modules), people)


def _kept(
    ground: Ground,
    made_of: str,
    what: tuple[str, int, int],
    episodes: Callable[[Sequence[Blocks]], Iterable[CoreBasis]],
    people: Sequence[Person] = (),
) -> CoreBasis:
    """The best basis of some episodes, which lies in the study's folder once it was found.

    Args:
        people: whose text it is learnt from; as many of the first users of the basis if left out.
    """
    how, k, users = what
    path = ground.folder / f"{how}-{ground.key(made_of)}.safetensors"
    if not path.exists():
        found = episodes([ground.training(one) for one in people or ground.roles.basis[:users]])
        basis_file.write(_best(ground, found, f"k={k} {how}, of {users} users"), path)
    return basis_file.read(path)


def _episodes(ground: Ground, k: int, modules: Sequence[str], texts: Sequence[Blocks]) -> Iterator[CoreBasis]:
    """The basis after every episode, from random directions."""
    start = ground.drawn(k, modules)
    for episode in range(ROUNDS["rounds"] // ROUNDS["episode"]):
        adam = BasisAdam(orthonormal(start), rate=ROUNDS["rate"])
        own = [cores.zero(start)] * len(texts)
        for number in range(ROUNDS["episode"]):
            own = _round(ground, texts, own, adam=adam, seed=episode * ROUNDS["episode"] + number)
        start = orthonormal(adam.basis())
        yield start


def _round(
    ground: Ground, texts: Sequence[Blocks], own: Sequence[CoreAdapter], *, adam: BasisAdam, seed: int
) -> list[CoreAdapter]:
    """Everybody's core some steps further, and the basis one."""
    basis = adam.basis()
    after: list[CoreAdapter] = []
    total = {name: (0 * u, 0 * v) for name, (u, v) in basis.sides.items()}
    for first in range(0, len(texts), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        training = trained_in(ground, basis, texts[some], own[some], seed=seed)
        after += [training.adapter(user).core for user in training.users]
        for name, (u, v) in training.basis_gradient().items():
            total[name] = total[name][0] + u, total[name][1] + v
    adam.step({name: (u / len(texts), v / len(texts)) for name, (u, v) in total.items()})
    return after


def trained_in(
    ground: Ground, basis: CoreBasis, texts: Sequence[Blocks], own: Sequence[CoreAdapter], *, seed: int
) -> Together[CoreInBasis]:
    """Users' cores a round further, and what they say together of where U and V should go."""
    options = TrainOptions(batch_size=BATCH, learning_rate=ROUNDS["core_rate"], b_ratio=1.0, seed=seed)
    starts = [CoreInBasis(replace(core, basis_id=basis.id), basis) for core in own]
    training: Together[CoreInBasis] = Together(
        ground.beside.top, ground.base.plan, texts, starts=starts, options=options
    )
    training.watch_basis()
    training.advance(ROUNDS["steps"])
    return training


def _best(ground: Ground, found: Iterable[CoreBasis], what: str) -> CoreBasis:
    """The last of some bases before one that is no better for cores of whom step sizes are chosen on."""
    tuned = [ground.training(one) for one in ground.roles.tuned]
    best, least = None, math.inf
    for basis in found:
        way = InLoop(ground.beside, CoreInBasis(cores.zero(basis), basis), of_core, seed=ground.seed)
        held = way.run(tuned, rate=LEARN["core_rate"] / B_RATIO, marks=_MARKS)
        loss = min(ground.tuning_loss(way, one) for one in held)
        click.echo(f"{ground.corpus}: basis {what}: {loss:.4f}")
        if not loss < least:
            break
        best, least = basis, loss
    assert best is not None
    return best
