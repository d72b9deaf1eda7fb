"""Many users searched for at once: each gets what `personalise` finds for them alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.data import IGNORE
from soppu.federation import emulator
from soppu.federation.attach import initial_pairs
from soppu.federation.personalise import SearchOptions, personalise
from soppu.federation.personalise_many import Ground, personalise_many
from soppu.federation.train import CachedBlock, Training, TrainOptions, mean_loss, mean_losses

SEARCH = SearchOptions(learning_rates=(3e-2, 1e-1), steps=12, check_every=2, patience=1)


def options(rate: float) -> TrainOptions:
    return TrainOptions(batch_size=2, learning_rate=rate, prox_weight=1e-2, seed=0)


def ground(model: PreTrainedModel) -> tuple[Ground, CoreInBasis]:
    """Users of 2, 3 and 5 random texts of unlike lengths, and a core that all begin with."""
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.0)
    draw = torch.Generator().manual_seed(0)
    texts = [
        [
            CachedBlock(
                torch.randn(size, 32, generator=draw),
                torch.cat([torch.tensor([IGNORE]), torch.randint(2, 290, (size - 1,), generator=draw)]),
            )
            for size in torch.randint(4, 12, (count,), generator=draw).tolist()
        ]
        for count in (2, 3, 5)
    ]
    sides = {
        name: (torch.randn(o, 3, generator=draw) / o**0.5, torch.randn(i, 3, generator=draw) / i**0.5)
        for name, (o, i) in emulator.target_shapes(model, plan).items()
    }
    basis = CoreBasis(sides, base_hash="b" * 64)
    unseen = [[text[0], texts[-1 - at][1]] for at, text in enumerate(texts)]  # one of their own, one strange
    made = Ground(emulator.TopModel(model, plan), plan, texts, unseen)
    return made, CoreInBasis(cores.zero(basis), basis)


@pytest.mark.parametrize("own_rank", [0, 1])
def test_each_comes_to_what_is_found_alone(tiny_llama: PreTrainedModel, own_rank: int) -> None:
    at, start = ground(tiny_llama)
    if own_rank:
        own = initial_pairs(start.basis.module_shapes(), rank=own_rank, seed=0)
        start = replace(start, core=replace(start.core, own=own))
    many = personalise_many(at, starts=[start] * len(at.train), search=SEARCH, options=options)
    for found, train, validation in zip(many, at.train, at.validation, strict=True):

        def begin(rate: float, train: list[CachedBlock] = train) -> Training[CoreInBasis]:  # type: ignore[assignment]
            return Training(at.top, at.plan, train, start=start, options=options(rate))

        def measure(placed: CoreInBasis | None, text: list[CachedBlock] = validation) -> float:  # type: ignore[assignment]
            return mean_loss(at.top, at.plan, text, adapter=placed.to_lora() if placed else None)

        alone = personalise(begin, measure, start=start, search=SEARCH)
        chosen = ("learning_rate", "steps", "share")
        assert [getattr(found, name) for name in chosen] == [getattr(alone, name) for name in chosen]
        for name in ("base", "shared", "personal", "first_loss", "last_loss"):
            assert getattr(found, name) == pytest.approx(getattr(alone, name), abs=1e-5)
        for name, core in found.adapter.core.cores.items():
            torch.testing.assert_close(core, alone.adapter.core.cores[name], rtol=1e-3, atol=1e-5)
    assert len({one.steps for one in many}) > 1  # or nobody was left behind by the others


def test_losses_of_many_are_those_of_each(tiny_llama: PreTrainedModel) -> None:
    at, start = ground(tiny_llama)
    draw = torch.Generator().manual_seed(1)
    placed = [
        replace(
            start,
            core=replace(
                start.core,
                cores={name: torch.randn(3, 3, generator=draw) for name in start.core.cores},
            ),
        )
        for _ in at.train
    ]
    found = mean_losses(at.top, at.plan, at.train, adapters=placed)
    for loss, text, one in zip(found, at.train, placed, strict=True):
        assert loss == pytest.approx(mean_loss(at.top, at.plan, text, adapter=one.to_lora()), abs=1e-5)
    base = mean_losses(at.top, at.plan, at.train, adapters=None)
    assert base[0] == pytest.approx(mean_loss(at.top, at.plan, at.train[0], adapter=None), abs=1e-5)
