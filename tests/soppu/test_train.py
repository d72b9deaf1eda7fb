"""The training loop against the plain way of doing it: whole model, autograd everywhere, dense matrices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter, LoraPair
from soppu.data import IGNORE, Block, collate
from soppu.federation import emulator, train
from soppu.federation.attach import attached
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import CachedBlock, TrainOptions

PAD = 1


def make_plan(model: PreTrainedModel) -> LayerPlan:
    return emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.34)


def make_blocks(*lengths: int, prompt: int = 3, seed: int = 0) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for length in lengths:
        ids = torch.randint(2, 300, (length,), generator=generator)
        blocks.append(Block(ids, torch.where(torch.arange(length) < prompt, IGNORE, ids)))
    return blocks


def make_start(model: PreTrainedModel, plan: LayerPlan, *, spread: float = 0.2) -> LoraAdapter:
    """Random in both factors, so that neither gradient is zero."""
    generator = torch.Generator().manual_seed(5)
    pairs = {
        name: LoraPair(
            torch.randn(3, i, generator=generator) * 0.2, torch.randn(o, 3, generator=generator) * spread
        )
        for name, (o, i) in emulator.target_shapes(model, plan).items()
    }
    return LoraAdapter(pairs, "tiny", plan.base_hash, plan.fan_in_fan_out)


def trainable(adapter: LoraAdapter) -> LoraAdapter:
    pairs = {
        name: LoraPair(p.A.clone().requires_grad_(), p.B.clone().requires_grad_())
        for name, p in adapter.pairs.items()
    }
    return dataclasses.replace(adapter, pairs=pairs)


def plain_loss(model: PreTrainedModel, adapter: LoraAdapter, blocks: Sequence[Block]) -> Tensor:
    """Mean cross-entropy through the whole model, its logits at every position."""
    ids, mask, labels = collate(blocks, pad_id=PAD)
    with attached(model, adapter):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    )


def bench(model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[LayerPlan, TopModel, list[CachedBlock]]:
    plan = make_plan(model)
    bottom = emulator.with_layers(model, plan.kept)
    return plan, TopModel(model, plan), train.cache_states(bottom, blocks, pad_id=PAD)


# ---- the same numbers as the plain way


def test_loss_and_gradients_equal_those_through_the_whole_emulator_model(tiny_model: PreTrainedModel) -> None:
    blocks = make_blocks(9, 5, 12)
    plan, top, cached = bench(tiny_model, blocks)
    start = make_start(tiny_model, plan)
    whole = emulator.with_layers(tiny_model, plan.emulator)
    reference = trainable(emulator.to_own(start, plan, plan.emulator))
    expected = plain_loss(whole, reference, blocks)
    expected.backward()

    ours = trainable(emulator.to_own(start, plan, plan.adapter))
    with attached(top.model, ours):
        summed, count = train.batch_loss(top, cached)
    (summed / count).backward()

    assert count == sum(int((b.labels[1:] != IGNORE).sum()) for b in blocks)
    torch.testing.assert_close(summed / count, expected, rtol=1e-5, atol=1e-5)
    back = emulator.to_full(reference, plan, plan.emulator).pairs
    for name, pair in emulator.to_full(ours, plan, plan.adapter).pairs.items():
        for side in ("A", "B"):
            found, wanted = getattr(pair, side).grad, getattr(back[name], side).grad
            assert wanted.abs().max() > 0
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_few_steps_of_fit_equal_adamw_on_the_whole_emulator_model(tiny_llama: PreTrainedModel) -> None:
    blocks = make_blocks(8, 8, 8)
    plan, top, cached = bench(tiny_llama, blocks)
    start = make_start(tiny_llama, plan)
    options = TrainOptions(steps=4, batch_size=3, learning_rate=1e-3, b_ratio=3.0)
    result = train.fit(top, plan, cached, start=start, options=options)

    whole = emulator.with_layers(tiny_llama, plan.emulator)
    reference = trainable(emulator.to_own(start, plan, plan.emulator))
    pairs = reference.pairs.values()
    optimizer = torch.optim.AdamW(
        [{"params": [p.A for p in pairs], "lr": 1e-3}, {"params": [p.B for p in pairs], "lr": 3e-3}],
        weight_decay=0.0,
    )
    losses = []
    for _ in range(4):  # a batch of three of three is all of them, in whatever order
        loss = plain_loss(whole, reference, blocks)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (result.first_loss, result.last_loss) == pytest.approx((losses[0], losses[-1]), rel=1e-4)
    for name, pair in emulator.to_full(reference, plan, plan.emulator).pairs.items():
        torch.testing.assert_close(result.adapter.pairs[name].A, pair.A.detach(), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(result.adapter.pairs[name].B, pair.B.detach(), rtol=1e-3, atol=6e-5)


def test_nothing_runs_backward_below_the_adapter(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama").requires_grad_(True)  # even if somebody forgot to freeze it
    plan, top, cached = bench(model, make_blocks(9, 5))
    assert all(not b.states.requires_grad and b.states.grad_fn is None for b in cached)
    train.fit(top, plan, cached, start=make_start(model, plan), options=TrainOptions(steps=2))
    below = [model.get_input_embeddings(), *(emulator.decoder_layers(model)[n] for n in plan.bottom)]
    assert all(p.grad is None for module in below for p in module.parameters())


def test_states_are_those_of_each_block_alone_and_in_their_order(tiny_model: PreTrainedModel) -> None:
    blocks = make_blocks(4, 11, 7, 5, 9)
    bottom = emulator.with_layers(tiny_model, make_plan(tiny_model).kept)
    for batch_size in (1, 2, 8):
        cached = train.cache_states(bottom, blocks, pad_id=PAD, batch_size=batch_size)
        for block, found in zip(blocks, cached, strict=True):
            ids = block.ids[None]
            with torch.no_grad():
                expected = emulator.bottom_states(bottom, ids, torch.ones_like(ids))[0]
            torch.testing.assert_close(found.states, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.labels, block.labels)


# ---- what counts


def test_the_prompt_is_not_learned(tiny_llama: PreTrainedModel) -> None:
    (block,) = make_blocks(10, prompt=6)
    _, top, (cached,) = bench(tiny_llama, [block])
    loss, count = train.batch_loss(top, [cached])
    with torch.no_grad():
        logits = top.logits(top.hidden(cached.states[None], torch.ones(1, 10)))[0].log_softmax(-1)
    by_hand = -sum(float(logits[t - 1, block.ids[t]]) for t in range(6, 10))
    assert count == 4
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    open_prompt = CachedBlock(cached.states, block.ids)
    assert train.batch_loss(top, [open_prompt])[1] == 9
    assert float(train.batch_loss(top, [open_prompt])[0]) > float(loss)


def test_a_batch_is_the_sum_of_its_examples(tiny_model: PreTrainedModel) -> None:
    _, top, cached = bench(tiny_model, make_blocks(4, 12, 7))
    together, count = train.batch_loss(top, cached)
    alone = [train.batch_loss(top, [block]) for block in cached]
    assert count == sum(n for _, n in alone)
    assert float(together) == pytest.approx(sum(float(loss) for loss, _ in alone), rel=1e-4)


def test_a_block_without_labels_does_no_harm(tiny_llama: PreTrainedModel) -> None:
    plan, top, cached = bench(tiny_llama, make_blocks(6, prompt=6))
    start = make_start(tiny_llama, plan)
    result = train.fit(top, plan, cached, start=start, options=TrainOptions(steps=2))
    assert (result.first_loss, result.last_loss) == (0.0, 0.0)
    assert all(torch.isfinite(p.A).all() and torch.isfinite(p.B).all() for p in result.adapter.pairs.values())


# ---- the proximal term


def dense(pairs: dict[str, LoraPair], start: dict[str, LoraPair]) -> Tensor:
    return sum(
        ((p.delta() - start[name].delta()).square().sum() for name, p in pairs.items()), torch.zeros(())
    )


def random_pairs(seed: int, *, rank: int = 3, grad: bool = False) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    return {
        name: LoraPair(draw(rank, i), draw(o, rank)) for name, (o, i) in {"a": (5, 7), "b": (6, 4)}.items()
    }


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
def test_proximal_equals_the_dense_distance_and_so_does_its_gradient(seed: int, rank: int) -> None:
    """The published code reads detached weights: its term is there, and its gradient is zero. Not here."""
    start = random_pairs(seed)
    ours, theirs = (random_pairs(seed + 1, rank=rank, grad=True) for _ in range(2))
    found, wanted = train.proximal(ours, start), dense(theirs, start)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    found.backward()
    wanted.backward()
    for name in ours:
        for side in ("A", "B"):
            grad = getattr(ours[name], side).grad
            assert grad.abs().max() > 1e-3
            torch.testing.assert_close(grad, getattr(theirs[name], side).grad, rtol=1e-6, atol=1e-6)


def test_proximal_is_zero_at_the_start_and_does_not_care_how_the_product_is_made() -> None:
    pairs = random_pairs(1)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    same = {name: LoraPair(turn @ p.A, p.B @ turn.T) for name, p in pairs.items()}
    assert float(train.proximal(pairs, pairs)) == pytest.approx(0.0, abs=1e-9)
    assert float(train.proximal(same, pairs)) == pytest.approx(0.0, abs=1e-9)


def test_the_proximal_term_pulls_towards_the_start(tiny_llama: PreTrainedModel) -> None:
    plan, top, cached = bench(tiny_llama, make_blocks(10, 10, 10))
    start = make_start(tiny_llama, plan, spread=0.05)
    distances = []
    for weight in (0.0, 0.03, 3.0):
        options = TrainOptions(steps=25, learning_rate=5e-3, prox_weight=weight)
        adapter = train.fit(top, plan, cached, start=start, options=options).adapter
        distances.append(float(dense(dict(adapter.pairs), dict(start.pairs))))
    assert distances[0] > 1.3 * distances[1] > 1.3 * 1.3 * distances[2] > 0


# ---- the loop


def test_fit_learns_and_leaves_its_start_alone(tiny_llama: PreTrainedModel) -> None:
    plan, top, cached = bench(tiny_llama, make_blocks(10, 10, 10))
    start = make_start(tiny_llama, plan, spread=0.0)
    before = LoraAdapter({n: LoraPair(p.A.clone(), p.B.clone()) for n, p in start.pairs.items()}, "tiny")
    options = TrainOptions(steps=30, learning_rate=1e-2)
    result = train.fit(top, plan, cached, start=start, options=options)
    assert result.last_loss < result.first_loss - 0.5
    assert result.steps == 30
    assert all(
        torch.equal(start.pairs[n].A, p.A) and torch.equal(start.pairs[n].B, p.B)
        for n, p in before.pairs.items()
    )
    assert result.adapter.pairs.keys() == start.pairs.keys()
    assert (result.adapter.base_model, result.adapter.base_hash) == ("tiny", plan.base_hash)
    assert all(
        side.dtype == torch.float32 and not side.requires_grad
        for pair in result.adapter.pairs.values()
        for side in (pair.A, pair.B)
    )


def test_the_seed_fixes_everything(tiny_llama: PreTrainedModel) -> None:
    plan, top, cached = bench(tiny_llama, make_blocks(9, 7, 8, 10, 6))
    start = make_start(tiny_llama, plan)

    def run(seed: int) -> str:
        options = TrainOptions(steps=4, batch_size=2, seed=seed)
        return train.fit(top, plan, cached, start=start, options=options).adapter.content_hash()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_b_takes_larger_steps_than_a(tiny_llama: PreTrainedModel) -> None:
    """Adam's first step is the learning rate wide whatever the gradient: alpha / r has to enter there."""
    plan, top, cached = bench(tiny_llama, make_blocks(9, 7))
    start = make_start(tiny_llama, plan)
    options = TrainOptions(steps=1, learning_rate=1e-3, b_ratio=4.0)
    moved = train.fit(top, plan, cached, start=start, options=options).adapter
    for name, pair in moved.pairs.items():
        assert float((pair.A - start.pairs[name].A).abs().median()) == pytest.approx(1e-3, rel=0.02)
        assert float((pair.B - start.pairs[name].B).abs().median()) == pytest.approx(4e-3, rel=0.02)


@settings(max_examples=100)
@given(n=st.integers(1, 12), batch=st.integers(1, 6), steps=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_example_comes_once_before_any_comes_again(n: int, batch: int, steps: int, seed: int) -> None:
    endless = train.batches(n, TrainOptions(batch_size=batch, seed=seed))
    batches = list(itertools.islice(endless, steps))
    assert [len(chosen) for chosen in batches] == [min(batch, n)] * steps
    order = [index for chosen in batches for index in chosen]
    for start in range(0, len(order), n):
        epoch = order[start : start + n]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(n))
