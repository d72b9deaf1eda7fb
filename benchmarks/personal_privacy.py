"""What a user's numbers give away, and what noise on them costs: further rows of personal.json.

    python -m benchmarks.personal_privacy [--corpus stdlib]

After `benchmarks.personal`, whose users' numbers it takes. `membership`: how well a threshold on the loss of
an example tells text that was trained on from text that was held out. `private`: clipping and noise at the
client, before anything is sent, by the function that clients of a federation call; the clipping norm is
chosen on users who are not reported. The noise is drawn anew each time: those rows do not repeat to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import personal_arms as arms
from benchmarks.personal import add, ground_of, own_of, stored
from benchmarks.personal_arms import FULL, Arm, on_down
from benchmarks.personal_ground import Ground
from benchmarks.personal_users import CORPORA
from benchmarks.personal_ways import Blocks, Model
from benchmarks.record import circumstances
from clients.privacy import hidden
from soppu.adapter import LoraAdapter
from soppu.evaluate.intervals import interval
from soppu.evaluate.losses import example_losses
from soppu.federation import wire
from soppu.federation.privacy import epsilon_of
from soppu.sharing import SharingSettings

_OURS = tuple(on_down(arms.FEDERATED, k) for k in (64, 32, 16))
ATTACKED = (Arm(arms.SHARED), Arm(FULL), *_OURS, on_down(arms.LORA, own=1))
NOISED = (Arm(FULL), *_OURS)
EPSILONS: tuple[float | None, ...] = (None, 8.0, 3.0, 1.0)
DELTA = 1e-5
CLIPS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # of the median norm of what users who are not reported train


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The chance that a member's loss is below another's, equal ones counted half. O(n m)."""
    apart = np.subtract.outer(np.asarray(others), np.asarray(members))
    return float((apart > 0).mean() + 0.5 * (apart == 0).mean())


def noise_of(epsilon: float, delta: float) -> float:
    """Least noise, in clipping norms, at which one release by a client is (epsilon, delta) private, to 1 %.

    Neighbours are any two texts of a user, whose clipped changes are up to two norms apart.
    """
    low, high = 0.1, 100.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        found = epsilon_of(middle / 2, 1, delta)
        low, high = (low, middle) if found is not None and found <= epsilon else (middle, high)
    return high


def told_again(arm: Arm, ground: Ground, tensors: Mapping[str, Tensor]) -> LoraAdapter:
    """A user's numbers as an adapter of the model that they were trained on."""
    if arm.name in (FULL, arms.LORA):
        return ground.adapter(tensors)
    return arms.core_of(arm, ground, tensors).to_lora()


def model_of(arm: Arm, ground: Ground) -> Model:
    """The model that an arm's numbers were trained on."""
    return ground.plain if arm.name in (arms.SHARED, FULL, arms.CORE) else ground.beside


def begun(arm: Arm, ground: Ground) -> dict[str, Tensor]:
    """The numbers that a user's training starts from, the same for everybody."""
    return wire.to_state(ground.shared) if arm.name == FULL else arms.start_of(arm, ground).core.tensors()


def membership(arm: Arm, ground: Ground) -> dict[str, Any]:
    """AUC of the attack on every reported user, and of one that knows the loss with shared too."""
    plain: dict[str, float] = {}
    knowing: dict[str, float] = {}
    held = {} if arm.name == arms.SHARED else own_of(arm, ground)
    for who in ground.roles.reported:
        text = ground.text(who)
        own, model = ground.shared, ground.plain
        if arm.name != arms.SHARED:
            own = told_again(arm, ground, held[who.id])
            model = model_of(arm, ground)
        inside, outside = [_each(model, part, own) for part in (text.train, text.heldout)]
        plain[who.id] = auc(inside, outside)
        known = [_each(ground.plain, part, ground.shared) for part in (text.train, text.heldout)]
        knowing[who.id] = auc(*(np.subtract(a, b) for a, b in zip((inside, outside), known, strict=True)))
    found = interval(np.array(list(plain.values())), np.ones(len(plain)), seed=0)
    return _named(arm, ground) | {
        "mean": found.mean,
        "interval": (found.low, found.high),
        "knowing_shared": sum(knowing.values()) / len(knowing),
        "auc": plain,
    }


def _each(model: Any, blocks: Blocks, adapter: LoraAdapter | None) -> list[float]:
    """Mean loss of every example."""
    return [loss / max(1, count) for loss, count in _summed(model, blocks, adapter)]


def _summed(model: Any, blocks: Blocks, adapter: LoraAdapter | None) -> Iterator[tuple[float, int]]:
    yield from example_losses(model.exact, model.plan, blocks, adapter=adapter)


def private(arm: Arm, ground: Ground) -> Iterator[dict[str, Any]]:
    """A row for every epsilon: what reported users lose by noise that is worth it."""
    start, trained = begun(arm, ground), own_of(arm, ground)
    trials = _trained_on_tuned(arm, ground)
    median = float(np.median([_norm(one, start) for one in trials]))
    for epsilon in EPSILONS:
        noise = noise_of(epsilon, DELTA) if epsilon else 0.0
        settings = {
            share: SharingSettings(dp_at="client", dp_clip=share * median, dp_noise=noise) for share in CLIPS
        }
        tried = {
            share: _mean(arm, ground, [hidden(one, start, how) for one in trials])
            for share, how in (settings.items() if epsilon else ())
        }
        share = min(tried, key=tried.__getitem__) if epsilon else 0.0
        losses = {}
        for who in ground.roles.reported:
            sent = hidden(trained[who.id], start, settings[share]) if epsilon else trained[who.id]
            text, own = ground.text(who).heldout, told_again(arm, ground, sent)
            losses[who.id] = model_of(arm, ground).judged(text, own)
        yield _named(arm, ground) | {
            "epsilon": epsilon,
            "delta": DELTA,
            "noise": noise,
            "clip": share * median,
            "numbers": sum(one.numel() for one in start.values()),
            "mean": sum(losses.values()) / len(losses),
            "losses": losses,
        }


def _trained_on_tuned(arm: Arm, ground: Ground) -> list[dict[str, Tensor]]:
    way = arms.way_of(arm, ground)
    tuned = ground.tuned(str(arm), way, first=arms.first_rates(arm))
    (held,) = way.run(
        [ground.training(who) for who in ground.roles.tuned], rate=tuned.rate, marks=[tuned.steps]
    )
    return [way.sent(one) for one in held]


def _mean(arm: Arm, ground: Ground, held: Sequence[Mapping[str, Tensor]]) -> float:
    losses = [
        model_of(arm, ground).loss(text, told_again(arm, ground, one))
        for one, text in zip(held, ground.unseen(), strict=True)
    ]
    return sum(losses) / len(losses)


def _norm(now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    return float(sum((now[name] - start[name]).square().sum() for name in start)) ** 0.5


def _named(arm: Arm, ground: Ground) -> dict[str, Any]:
    return {
        "corpus": ground.corpus,
        "arm": arm.name,
        "k": arm.k,
        "own": arm.own,
        "basis_users": arm.basis_users,
        "modules": list(arm.modules),
        "key": ground.key(str(arm)),
    }


@click.command()
@click.option("--corpus", "corpora", multiple=True, default=tuple(CORPORA), type=click.Choice(tuple(CORPORA)))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def main(corpora: tuple[str, ...], threads: int, seed: int) -> None:
    """Measure what is missing of the arms that the study has."""
    torch.set_num_threads(threads)
    where = circumstances(seed=seed)
    for corpus in corpora:
        measure(ground_of(corpus, seed=seed), where)


def measure(ground: Ground, where: Mapping[str, Any]) -> None:
    """Both kinds of rows, each written down as it is made; those that are there are not made again."""

    def there(among: str, arm: Arm) -> bool:
        return any(row["key"] == ground.key(str(arm)) for row in stored().get(among, []))

    for arm in ATTACKED:
        if there("rows", arm) and not there("membership", arm):
            add(membership(arm, ground), ground, where, among="membership")
    for arm in NOISED:
        if there("rows", arm) and not there("private", arm):
            for row in list(private(arm, ground)):
                add(row, ground, where, among="private")
                click.echo(f"{ground.corpus:10} {arm!s:24} epsilon {row['epsilon']}: {row['mean']:.4f}")


if __name__ == "__main__":
    main()
