"""Cores of many users trained in one pass, beside one user after the other: benchmarks/results/batched.json.

    python -m benchmarks.batched [--users 200]

Two sizes: `tiny`, the random model of the tests, where a step is mostly overhead; and `smollm2`, the last
four layers of SmolLM2-135M on texts of the corpus, where a step is mostly arithmetic; of fewer users,
behind states that are drawn, since a step's time does not depend on what is in them. Both ways take the same
steps on the same batches with the loop of `soppu join`; alone, the larger model is timed on every
fifth user. Loss differences are over all steps and all users who were trained both ways.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.record import circumstances, store
from soppu import models
from soppu.config import DataConfig
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.data import IGNORE, Block, list_users, load_user, tokenize
from soppu.federation import emulator
from soppu.federation.train import CachedBlock, Together, Training, TrainOptions
from tests.soppu.serve import tiny

SEED, BATCH, STEPS, THREADS = 0, 4, 2, 2
OPTIONS = TrainOptions(batch_size=BATCH, learning_rate=1e-3, b_ratio=2.0, seed=SEED)


@dataclass(frozen=True, eq=False)
class Case:
    """A model cut for training, and every user's text behind its frozen part."""

    top: emulator.TopModel
    plan: emulator.LayerPlan
    basis: CoreBasis
    texts: Sequence[Sequence[CachedBlock]]
    every: int  # each how-manieth user is trained alone too

    def start(self) -> CoreInBasis:
        """Where every user begins."""
        return CoreInBasis(cores.zero(self.basis), self.basis)


def a_case(model: Any, texts: Sequence[Sequence[Block]], *, layers: int, k: int, every: int) -> Case:
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=layers, drop_ratio=0.0)
    draw = torch.Generator().manual_seed(SEED)
    sides = {
        name: tuple(torch.linalg.qr(torch.randn(size, min(k, size), generator=draw))[0] for size in shape)
        for name, shape in emulator.target_shapes(model, plan).items()
    }
    basis = CoreBasis(sides, base_hash="b" * 64)  # type: ignore[arg-type]
    width = model.config.hidden_size
    states = [
        [CachedBlock(torch.randn(len(b.ids), width, generator=draw), b.labels) for b in own] for own in texts
    ]
    return Case(emulator.TopModel(model, plan), plan, basis, states, every)


def tiny_case(users: int) -> Case:
    """Users of 3 to 8 random texts of 8 to 24 tokens."""
    draw = torch.Generator().manual_seed(SEED)
    texts = []
    for _ in range(users):
        sizes = torch.randint(8, 25, (int(torch.randint(3, 9, (1,), generator=draw)),), generator=draw)
        ids = [torch.randint(2, 290, (int(size),), generator=draw) for size in sizes]
        texts.append([Block(one, torch.where(torch.arange(len(one)) < 3, IGNORE, one)) for one in ids])
    torch.manual_seed(SEED)
    config = tiny.llama().config
    config.num_hidden_layers = 4
    model = type(tiny.llama())(config).eval().requires_grad_(False)
    return a_case(model, texts, layers=2, k=8, every=1)


def smollm2_case(users: int) -> Case:
    """The texts of the built-in corpus dealt out to this many users, at least a batch for each."""
    base = models.resolve("smollm2-135m", cache=Path(".soppu/models"))
    tokenizer, data = models.load_tokenizer(base), DataConfig(max_tokens=96, train_examples=10_000)
    blocks: list[Block] = []
    for user in list_users(data):
        blocks += tokenize(load_user(data, user).train, tokenizer, max_tokens=96)
        if len(blocks) >= users * BATCH:
            break
    texts = [blocks[user : users * BATCH : users] for user in range(users)]
    return a_case(models.load_model(base), texts, layers=4, k=32, every=5)


def together(case: Case) -> tuple[float, list[list[float]]]:
    """Seconds a user-step, and the losses: of every step, every user's."""
    training = Together(
        case.top, case.plan, case.texts, starts=[case.start() for _ in case.texts], options=OPTIONS
    )
    started = time.perf_counter()
    training.advance(STEPS)
    return (time.perf_counter() - started) / (STEPS * len(case.texts)), training.losses


def alone(case: Case) -> tuple[float, dict[int, list[float]]]:
    """The same of one user after the other: losses by user."""
    losses, seconds = {}, 0.0
    for user in range(0, len(case.texts), case.every):
        training = Training(case.top, case.plan, case.texts[user], start=case.start(), options=OPTIONS)
        started = time.perf_counter()
        training.advance(STEPS)
        seconds += time.perf_counter() - started
        losses[user] = training.losses
    return seconds / (STEPS * len(losses)), losses


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Both ways in turn; the best round of each counts, so a busy moment counts for neither."""
    pairs = [(alone(case), together(case)) for _ in range(rounds)]
    one_by_one, at_once = (min(pair[way][0] for pair in pairs) for way in (0, 1))
    (_, apart), (_, joint) = pairs[0]
    differences = [
        abs(step[user] - losses[number])
        for user, losses in apart.items()
        for number, step in enumerate(joint)
    ]
    tokens = sum(len(block.labels) for own in case.texts for block in own)
    return {
        "users": len(case.texts),
        "ratio": round(one_by_one / at_once, 2),
        "max_loss_difference": max(differences),
        "user_steps_a_second": round(1 / at_once, 2),
        "user_steps_a_second_one_by_one": round(1 / one_by_one, 2),
        "users_one_by_one": len(apart),
        "mean_tokens_an_example": round(tokens / sum(map(len, case.texts)), 1),
        "core": list(next(iter(case.basis.core_shapes().values()))),
    }


@click.command()
@click.option("--users", type=click.IntRange(2), default=200, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of the tiny model.")
@click.option("--smollm2/--no-smollm2", default=True, help="Whether the larger model is measured too.")
def main(users: int, rounds: int, smollm2: bool) -> None:
    torch.set_num_threads(THREADS)
    sizes = {"tiny": measured(tiny_case(users), rounds)}
    if smollm2:
        sizes["smollm2"] = measured(smollm2_case(users // 4), 1)
    for name, found in sizes.items():
        print(name, found)
    path = store(
        "batched",
        {
            **{key: sizes["tiny"][key] for key in ("users", "ratio", "max_loss_difference")},
            "of": "tiny",
            "steps": STEPS,
            "batch": BATCH,
            "threads": THREADS,
            "sizes": sizes,
            **circumstances(seed=SEED),
        },
    )
    print(path)


if __name__ == "__main__":
    main()
