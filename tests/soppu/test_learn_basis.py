"""A basis learnt through cores: its gradient against dense matrices, and what a newcomer has of it."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis, drawn, orthonormal
from soppu.cores.core import CoreInBasis
from soppu.errors import AdapterError
from soppu.federation import emulator, train
from soppu.federation.basis_adam import BasisAdam
from soppu.federation.learn_basis import LearnOptions, learnt
from soppu.federation.train import CachedBlock, Together, TrainOptions
from tests.soppu.test_trained import a_start, basis_of, bench, make_blocks, plain_loss, states


def test_the_gradient_of_the_basis_is_the_sum_over_users_of_the_dense_ones(
    tiny_model: PreTrainedModel,
) -> None:
    texts = [make_blocks(9, 5, seed=1), make_blocks(12, seed=2)]
    plan, top = bench(tiny_model)
    basis = basis_of(tiny_model, plan, 4)
    starts = [a_start(basis, seed=seed) for seed in (3, 4)]
    trained = train.Trained(starts, plan, top.device)
    trained.learn_basis()
    train.backward_each(
        top, [states(tiny_model, plan, text) for text in texts], lambda row: trained.attached(top.model, row)
    )
    whole = emulator.with_layers(tiny_model, plan.emulator)
    own = emulator.renumbered(basis.sides, plan.path, {n: at for at, n in enumerate(plan.emulator)})
    wanted: dict[str, list[Tensor]] = {
        name: [torch.zeros_like(u), torch.zeros_like(v)] for name, (u, v) in basis.sides.items()
    }
    for start, text in zip(starts, texts, strict=True):
        dense = {n: p.delta().requires_grad_() for n, p in start.to_lora().pairs.items()}
        plain_loss(whole, {own[name]: delta for name, delta in dense.items()}, text).backward()
        for name, delta in dense.items():
            (u, v), s = basis.sides[name], start.core.cores[name]
            assert delta.grad is not None
            wanted[name][0] += delta.grad @ v @ s.mT
            wanted[name][1] += delta.grad.mT @ u @ s
    for name, each in wanted.items():
        sides = trained._stacks[name].basis
        assert sides is not None
        for side, value in zip(sides, each, strict=True):
            assert side.grad is not None and value.abs().max() > 0
            torch.testing.assert_close(side.grad, value, rtol=1e-3, atol=1e-5)


def test_a_watched_basis_stands_still_and_its_gradients_add_up_over_steps(
    tiny_llama: PreTrainedModel,
) -> None:
    plan, top = bench(tiny_llama)
    basis = basis_of(tiny_llama, plan, 4)
    texts = [states(tiny_llama, plan, make_blocks(*sizes, seed=1)) for sizes in ((9, 5), (12,))]
    options, starts = TrainOptions(batch_size=4, learning_rate=1e-2), [a_start(basis, seed=s) for s in (3, 4)]

    def begin() -> Together[CoreInBasis]:
        return Together(top, plan, texts, starts=starts, options=options)

    watched, wanted = begin(), {name: [0 * u, 0 * v] for name, (u, v) in basis.sides.items()}
    watched.watch_basis()
    watched.advance(3)
    for steps in range(3):  # one after the other: where cores are by then, and the gradient there
        plain = begin()
        plain.advance(steps)
        there = train.Trained([plain.adapter(user) for user in plain.users], plan, top.device)
        there.learn_basis()
        train.backward_each(top, texts, partial(there.attached, top.model))
        for name, slopes in there.basis_gradient().items():
            wanted[name] = [total + slope for total, slope in zip(wanted[name], slopes, strict=True)]
    assert watched.basis().id == basis.id
    for name, slopes in watched.basis_gradient().items():
        for slope, total in zip(slopes, wanted[name], strict=True):
            assert total.abs().max() > 0
            torch.testing.assert_close(slope, total, rtol=1e-3, atol=1e-5)
    core = begin()
    core.advance(3)
    assert torch.equal(core.adapter(1).core.cores[name], watched.adapter(1).core.cores[name])


def test_adam_goes_on_where_it_was_and_does_not_mind_how_large_gradients_are() -> None:
    start = drawn({"a": (7, 5), "b": (6, 4)}, 2, seed=0)
    draw = torch.Generator().manual_seed(1)
    slopes = [
        {
            n: (torch.randn(u.shape, generator=draw), torch.randn(v.shape, generator=draw))
            for n, (u, v) in start.sides.items()
        }
        for _ in range(4)
    ]
    whole = BasisAdam(start, rate=0.01)
    for slope in slopes:
        whole.step(slope)
    first = BasisAdam(start, rate=0.01)
    for slope in slopes[:2]:
        first.step(slope)
    second = BasisAdam(first.basis(), rate=0.01)
    second.resume(first.moments())
    for slope in slopes[2:]:
        second.step(slope)
    assert second.basis().id == whole.basis().id != start.id
    larger = BasisAdam(start, rate=0.01)
    larger.resume({})
    for slope in slopes:
        larger.step({n: (1e3 * u, 1e3 * v) for n, (u, v) in slope.items()})
    torch.testing.assert_close(larger.basis().tensors(), whole.basis().tensors(), rtol=0, atol=1e-6)
    with pytest.raises(KeyError):
        BasisAdam(start, rate=0.01).resume({"0.step": torch.ones(())})


def test_a_core_out_of_a_learnt_basis_is_told_in_it(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    basis, cached = basis_of(tiny_llama, plan, 4), states(tiny_llama, plan, make_blocks(9, 11, 12))
    options = TrainOptions(batch_size=3, learning_rate=1e-2, basis_rate=1e-2)
    together = Together(top, plan, [cached], starts=[a_start(basis)], options=options)
    together.advance(5)
    core = together.adapter(0)
    assert core.core.basis_id == core.basis.id == together.basis().id != basis.id
    ended = train.mean_loss(top, plan, cached, adapter=core.to_lora())
    together.advance(1)
    assert ended == pytest.approx(together.losses[-1][0], abs=1e-5)  # of all three examples, as batches are


def test_what_can_not_learn_a_basis_is_refused(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    start, text = a_start(basis_of(tiny_llama, plan, 3)), [states(tiny_llama, plan, make_blocks(9))]
    with pytest.raises(AdapterError, match="a LoRA has no basis that could be learnt"):
        Together(top, plan, text, starts=[start.to_lora()], options=TrainOptions(basis_rate=1e-3))
    with pytest.raises(AdapterError, match="prox_weight holds cores"):
        Together(top, plan, text, starts=[start], options=TrainOptions(basis_rate=1e-3, prox_weight=0.1))
    other = dataclasses.replace(start.basis, sides={"model.layers.0.mlp.down_proj": (torch.eye(2),) * 2})
    with pytest.raises(AdapterError, match=r"layers\.0"):
        next(learnt(top, plan, text, start=other, options=LearnOptions()))


def loss_of_a_newcomer(
    top: emulator.TopModel, plan: emulator.LayerPlan, basis: CoreBasis, blocks: list[CachedBlock]
) -> float:
    start = CoreInBasis(cores.zero(basis), basis)
    options = TrainOptions(steps=10, batch_size=2, learning_rate=0.03)
    return train.fit(top, plan, blocks, start=start, options=options).last_loss


def test_a_newcomer_has_of_a_learnt_basis_what_a_random_one_does_not_give(
    tiny_llama: PreTrainedModel,
) -> None:
    plan, top = bench(tiny_llama)
    text = make_blocks(12, 12, 12, 12, seed=5)  # all write alike, so there is something to have in common
    cohort = [states(tiny_llama, plan, text) for _ in range(3)]
    begin = drawn(emulator.target_shapes(tiny_llama, plan), 1, seed=0, base_hash="b" * 64)
    options = LearnOptions(episodes=2, steps=15, rate=0.02, core_rate=0.06, batch_size=2)
    found = list(learnt(top, plan, cohort, start=begin, options=options))
    losses = [loss_of_a_newcomer(top, plan, basis, cohort[0]) for basis in (begin, *found)]
    assert losses[0] - 0.1 > losses[1] > losses[2]
    for basis in found:
        assert basis.module_shapes() == begin.module_shapes() and basis.base == begin.base
        for u, v in basis.sides.values():
            torch.testing.assert_close(u.mT @ u, torch.eye(1))
            torch.testing.assert_close(v.mT @ v, torch.eye(1))
    again = list(learnt(top, plan, cohort, start=begin, options=options))
    assert [basis.id for basis in again] == [basis.id for basis in found]


def test_drawn_directions_are_orthonormal_and_of_their_seed_alone() -> None:
    shapes = {"a.q": (6, 9), "a.v": (3, 9)}
    basis = drawn(shapes, 4, seed=1)
    assert basis.core_shapes() == {"a.q": (4, 4), "a.v": (3, 4)} and basis.module_shapes() == shapes
    for side in (side for sides in basis.sides.values() for side in sides):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1]))
    assert drawn(shapes, 4, seed=1).id == basis.id != drawn(shapes, 4, seed=2).id


def test_directions_that_are_orthonormal_stay_and_others_span_what_they_did() -> None:
    whole = drawn({"a": (7, 5)}, 3, seed=0)
    torch.testing.assert_close(orthonormal(whole).tensors(), whole.tensors())
    draw = torch.Generator().manual_seed(2)
    mixed = {"a": tuple(side @ torch.randn(3, 3, generator=draw) for side in whole.sides["a"])}
    found = orthonormal(dataclasses.replace(whole, sides=mixed))
    for side, before in zip(found.sides["a"], whole.sides["a"], strict=True):
        torch.testing.assert_close(side.mT @ side, torch.eye(3))
        torch.testing.assert_close(side @ side.mT, before @ before.mT)
