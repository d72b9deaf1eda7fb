"""Whether the study's cheaper training comes to the same: further figures of personal.json.

    python -m benchmarks.personal_check [--corpus stdlib]

The full LoRAs of the users on whom step sizes are chosen, trained as the study trains them, through a head of
all tokens, and in float32 as well; their losses, all in float32 over all tokens. After a first block of arms.
"""

from __future__ import annotations

from typing import Any

import click
import torch

from benchmarks.personal import FOLDER, NAME, ground_of, of_these_settings, stored
from benchmarks.personal_arms import FULL
from benchmarks.personal_ground import Ground
from benchmarks.personal_users import CORPORA, Words
from benchmarks.personal_ways import InLoop, Model, whole
from benchmarks.record import store
from soppu import files


def checked(ground: Ground) -> dict[str, Any]:
    """Mean loss by way of training, and how far any user's is from what the study came to."""
    every = Words(torch.arange(ground.base.model.config.vocab_size))
    base, texts = ground.base, [ground.text(who).train for who in ground.roles.tuned]
    ways = {
        "as studied": (ground.plain, ground.words),
        "all tokens": (Model(base.model, base.plan, words=every, dtype=base.compute), every),
        "float32": (Model(base.model, base.plan, words=every, dtype=torch.float32), every),
    }
    tuned, losses = ground.tuned(FULL, ground.full()), dict[str, list[float]]()
    for name, (model, words) in ways.items():
        way = InLoop(model, ground.shared, whole, seed=ground.seed)
        told = [words.told(text) for text in texts]
        (held,) = way.run(told, rate=tuned.rate, marks=[tuned.steps])
        losses[name] = [
            ground.plain.judged(text, one) for one, text in zip(held, ground.unseen(), strict=True)
        ]
    return {
        name: {
            "mean": sum(own) / len(own),
            "apart": max(abs(a - b) for a, b in zip(own, losses["as studied"], strict=True)),
        }
        for name, own in losses.items()
    }


@click.command()
@click.option("--corpus", "corpora", multiple=True, default=tuple(CORPORA), type=click.Choice(tuple(CORPORA)))
@click.option("--seed", default=0, show_default=True)
def main(corpora: tuple[str, ...], seed: int) -> None:
    """Train them and write down what came of it."""
    torch.set_num_threads(1)
    for corpus in corpora:
        found = checked(ground_of(corpus, seed=seed))
        with files.exclusive(FOLDER / ".lock"):
            told = of_these_settings(stored())
            if corpus not in told.get("corpora", {}):
                raise click.ClickException(f"{NAME}.json has no rows of {corpus} of these settings yet")
            told["corpora"][corpus]["training"] = found
            store(NAME, told)
        click.echo(f"{corpus}: {found}")


if __name__ == "__main__":
    main()
