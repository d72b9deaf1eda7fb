"""One user's training: the best on validation text wins, nothing is worse than what it started from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter, LoraPair
from soppu.federation import emulator
from soppu.federation.attach import initial_pairs
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.personalise import BASE, PERSONAL, SHARED, SearchOptions, between, personalise, served
from soppu.federation.train import CachedBlock, Training, TrainOptions, mean_loss


class Bench:
    """A tiny top and random text of one user: `train` can be learnt, `validation` is of the same kind."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.plan: LayerPlan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.0)
        self.top = TopModel(model, self.plan)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(8, 12, model.config.hidden_size, generator=generator)
        labels = torch.randint(
            5, 9, (8, 12), generator=generator
        )  # four words: most of a vocabulary is unlearnt
        blocks = [CachedBlock(state, label) for state, label in zip(states, labels, strict=True)]
        self.train, self.validation = blocks[:6], blocks[6:]
        shapes = emulator.target_shapes(model, self.plan)
        self.start = LoraAdapter(initial_pairs(shapes, rank=2, seed=0), base_hash="b" * 64)

    def begin(self, rate: float) -> Training:
        options = TrainOptions(batch_size=2, learning_rate=rate, seed=3)
        return Training(self.top, self.plan, self.train, start=self.start, options=options)

    def measure(self, adapter: LoraAdapter | None) -> float:
        return mean_loss(self.top, self.plan, self.validation, adapter=adapter)


@pytest.fixture
def bench(tiny_llama: PreTrainedModel) -> Bench:
    return Bench(tiny_llama)


def test_the_loss_told_is_that_of_the_adapter_that_is_sent(bench: Bench) -> None:
    search = SearchOptions(learning_rates=(1e-2,), steps=12, check_every=4)
    found = personalise(bench.begin, bench.measure, start=bench.start, search=search)
    assert found.personal == bench.measure(found.adapter) < found.shared == found.base == bench.measure(None)
    assert served(base=found.base, shared=found.shared, personal=found.personal) == PERSONAL
    assert found.steps in (4, 8, 12) and found.last_loss < found.first_loss


def test_the_better_of_two_step_sizes_is_taken(bench: Bench) -> None:
    one, other, both = (
        personalise(
            bench.begin,
            bench.measure,
            start=bench.start,
            search=SearchOptions(learning_rates=rates, steps=6, check_every=3, shares=()),
        )
        for rates in ((1e-5,), (1e-2,), (1e-5, 1e-2))
    )
    assert both.learning_rate == (1e-5 if one.personal < other.personal else 1e-2)
    assert both.adapter.content_hash() == min((one, other), key=lambda it: it.personal).adapter.content_hash()


@pytest.mark.parametrize("looks", [[math.nan, 1.5], [1.5, math.nan]])
def test_a_training_that_diverges_is_not_the_better_one(bench: Bench, looks: list[float]) -> None:
    losses = iter([2.0, *looks, 3.0])  # shared; one look each; base
    search = SearchOptions(learning_rates=(1e-3, 1e-2), steps=1, check_every=1, shares=())
    found = personalise(bench.begin, lambda _: next(losses), start=bench.start, search=search)
    assert (found.personal, found.learning_rate) == (1.5, (1e-3, 1e-2)[looks.index(1.5)])


def test_training_stops_when_validation_does_and_gives_what_was_best(bench: Bench) -> None:
    asked: list[LoraAdapter | None] = []
    losses = iter([2.0, 1.5, 1.7, 1.6, 0.1, 9.0])  # shared; then four looks, and no fifth

    def measure(adapter: LoraAdapter | None) -> float:
        asked.append(adapter)
        return next(losses)

    search = SearchOptions(learning_rates=(1e-3,), steps=100, check_every=1, patience=2, shares=())
    found = personalise(bench.begin, measure, start=bench.start, search=search)
    assert (found.personal, found.steps, found.base) == (1.5, 1, 0.1)
    assert asked[1] is not None and found.adapter.content_hash() == asked[1].content_hash()
    assert len(asked) == 5  # shared, the first, two worse ones, and base


def test_who_learns_nothing_is_drawn_back_towards_the_shared_adapter(bench: Bench) -> None:
    def measure(adapter: LoraAdapter | None) -> float:
        """Worse the further from the start."""
        if adapter is None:
            return 5.0
        return 1.0 + sum(float((p.B - bench.start.pairs[n].B).norm()) for n, p in adapter.pairs.items())

    search = SearchOptions(learning_rates=(1e-2,), steps=5, check_every=5, shares=(0.25, 0.75))
    found = personalise(bench.begin, measure, start=bench.start, search=search)
    assert found.share == 0.25
    assert served(base=found.base, shared=found.shared, personal=found.personal) == SHARED


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_between_is_a_line_with_both_ends(bench: Bench, share: float) -> None:
    end = bench.begin(1e-2)
    end.advance(3)
    middle = between(bench.start, end.adapter(), share)
    for name, pair in middle.pairs.items():
        old, new = bench.start.pairs[name], end.adapter().pairs[name]
        torch.testing.assert_close(pair.A, torch.lerp(old.A, new.A, share))
        torch.testing.assert_close(pair.B, torch.lerp(old.B, new.B, share))


def test_training_carried_on_is_training_at_once(bench: Bench) -> None:
    parts, whole = bench.begin(1e-2), bench.begin(1e-2)
    for steps in (1, 2, 4):
        parts.advance(steps)
        parts.adapter()
    whole.advance(7)
    assert parts.adapter().content_hash() == whole.adapter().content_hash()
    assert parts.losses == whole.losses


def test_a_copy_taken_in_between_is_not_trained_on(bench: Bench) -> None:
    training = bench.begin(1e-2)
    training.advance(1)
    kept = training.adapter()
    before = {name: LoraPair(pair.A.clone(), pair.B.clone()) for name, pair in kept.pairs.items()}
    training.advance(2)
    assert all(torch.equal(pair.B, before[name].B) for name, pair in kept.pairs.items())


Served = Callable[..., str]


@pytest.mark.parametrize(
    ("base", "shared", "personal", "what"),
    [
        (3.0, 2.0, 1.0, PERSONAL),
        (3.0, 1.0, 2.0, SHARED),
        (1.0, 2.0, 3.0, BASE),
        (2.0, 1.0, 1.0, SHARED),
        (1.0, 1.0, 1.0, BASE),
        (3.0, 2.0, math.nan, SHARED),
        (3.0, math.inf, math.nan, BASE),
    ],
)
def test_the_best_is_served_and_the_simpler_of_equals(
    base: float, shared: float, personal: float, what: str
) -> None:
    assert served(base=base, shared=shared, personal=personal) == what
