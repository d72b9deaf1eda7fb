"""Whether two bases, each of users who are alike, win over one of all of them: further rows of personal.json.

    python -m benchmarks.personal_parts [--corpus stdlib] [--users 48]

After `benchmarks.personal`. Users of the basis are parted by what their first round says of U and V, as a
server sees it: into halves, by the direction in which these gradients differ most. A basis is learnt of each
half as a federation learns it; a reported user trains a core in both, and keeps the one that has the lower
loss on validation text of their own. The number of bases is then all that is more than one basis has: size
and steps are those of cores in one. Halves that were drawn are the control: to choose is to gain, too.

Source: clustered federated learning by bipartition (Sattler et al., 2019), choice by the user's own loss
(IFCA, Ghosh et al., NeurIPS 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import personal_arms as arms
from benchmarks.personal import add, ground_of
from benchmarks.personal_arms import DOWN, on_down
from benchmarks.personal_ground import Ground
from benchmarks.personal_learnt import federated_of, trained_in
from benchmarks.personal_users import CORPORA, Person
from benchmarks.personal_ways import InLoop, of_core
from benchmarks.record import circumstances
from soppu.cores import core as cores
from soppu.cores.core import CoreInBasis

K = 32
ALIKE, DRAWN = "two bases, of users alike", "two bases, of users drawn"


def gradients(ground: Ground, people: Sequence[Person]) -> Tensor:
    """What the first round of each says of U and V, (users, numbers), of length 1."""
    basis, told = ground.drawn(K, DOWN), []
    for person in people:
        text, own = [ground.training(person)], [cores.zero(basis)]
        sides = trained_in(ground, basis, text, own, seed=ground.seed).basis_gradient()
        told.append(torch.cat([side.flatten() for both in sides.values() for side in both]))
    return torch.nn.functional.normalize(torch.stack(told))


def halves(told: Tensor) -> list[list[int]]:
    """Rows (n, d) in two halves, by the direction in which they differ most. O(n^2 d)."""
    away = told - told.mean(0)
    _, vectors = torch.linalg.eigh((away @ away.mT).double())
    return _cut(torch.argsort(vectors[:, -1], stable=True).tolist())


def drawn_halves(people: Sequence[Person]) -> list[list[int]]:
    """The same by a hash of users' names."""
    ranks = [hashlib.sha256(f"half {person.id}".encode()).hexdigest() for person in people]
    return _cut(sorted(range(len(people)), key=ranks.__getitem__))


def _cut(order: Sequence[int]) -> list[list[int]]:
    middle = len(order) // 2
    return [sorted(order[:middle]), sorted(order[middle:])]


def chosen(ground: Ground, parts: Sequence[Sequence[Person]]) -> dict[str, Any]:
    """Reported users' losses, each in the basis of their choice, and in every one of them."""
    one, people = on_down(arms.FEDERATED, K), ground.roles.reported
    tuned = ground.tuned(str(one), arms.way_of(one, ground), first=arms.first_rates(one))
    texts, unseen, losses = [ground.training(who) for who in people], [], []
    for part in parts:
        basis = federated_of(ground, part, K, DOWN)
        way = InLoop(ground.beside, CoreInBasis(cores.zero(basis), basis), of_core, seed=ground.seed)
        (held,) = way.run(texts, rate=tuned.rate, marks=[tuned.steps])
        unseen.append([way.loss(o, ground.text(who).validation) for who, o in zip(people, held, strict=True)])
        losses.append([way.judged(o, ground.text(who).heldout) for who, o in zip(people, held, strict=True)])
    choice = torch.tensor(unseen).argmin(0).tolist()
    own = {who.id: losses[part][n] for n, (who, part) in enumerate(zip(people, choice, strict=True))}
    return {
        "mean": sum(own.values()) / len(own),
        "losses": own,
        "choice": {who.id: part for who, part in zip(people, choice, strict=True)},
        "mean_of_each": [sum(row) / len(row) for row in losses],
        "mean_of_better": sum(map(min, zip(*losses, strict=True))) / len(own),  # as nobody can choose
    }


def measured(name: str, ground: Ground, users: int) -> dict[str, Any]:
    """One row."""
    people = ground.roles.basis[:users]
    split = halves(gradients(ground, people)) if name == ALIKE else drawn_halves(people)
    parts = [[people[index] for index in part] for part in split]
    place = {"corpus": ground.corpus, "arm": name, "k": K, "basis_users": users, "modules": list(DOWN)}
    key = ground.key(f"{name} {K} {users}")
    return place | chosen(ground, parts) | {"users_of_each": [len(part) for part in parts], "key": key}


@click.command()
@click.option("--corpus", "corpora", multiple=True, default=tuple(CORPORA), type=click.Choice(tuple(CORPORA)))
@click.option(
    "--users", default=48, show_default=True, type=click.IntRange(4), help="Of both bases together."
)
@click.option("--control/--no-control", default=True, help="Whether halves are drawn, too.")
@click.option("--seed", default=0, show_default=True)
def main(corpora: tuple[str, ...], users: int, control: bool, seed: int) -> None:
    """Measure them and write rows down."""
    torch.set_num_threads(1)
    where = circumstances(seed=seed)
    for corpus in corpora:
        ground = ground_of(corpus, seed=seed)
        for name in (ALIKE, DRAWN)[: 1 + control]:
            row = measured(name, ground, users)
            add(row, ground, where, among="parts")
            click.echo(f"{corpus}: {name}: {row['mean']:.4f}, each alone {row['mean_of_each']}")


if __name__ == "__main__":
    main()
