"""Training a core in a basis against dense matrices and autograd, and many users against each alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.data import IGNORE, Block, collate
from soppu.errors import AdapterError
from soppu.federation import emulator, train
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import CachedBlock, Together, TrainOptions

PAD = 1


def make_blocks(*lengths: int, seed: int = 0) -> list[Block]:
    draw = torch.Generator().manual_seed(seed)
    blocks = []
    for length in lengths:
        ids = torch.randint(2, 300, (length,), generator=draw)
        blocks.append(Block(ids, torch.where(torch.arange(length) < 3, IGNORE, ids)))
    return blocks


def bench(model: PreTrainedModel) -> tuple[LayerPlan, TopModel]:
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.34)
    return plan, TopModel(model, plan)


def states(model: PreTrainedModel, plan: LayerPlan, blocks: Sequence[Block]) -> list[CachedBlock]:
    return train.cache_states(emulator.with_layers(model, plan.kept), blocks, pad_id=PAD)


def basis_of(model: PreTrainedModel, plan: LayerPlan, k: int | None) -> CoreBasis:
    """Random, k wide on either side; None is the full one, the unit vectors of every side."""
    draw = torch.Generator().manual_seed(1)

    def side(features: int) -> Tensor:
        return torch.eye(features) if k is None else torch.randn(features, k, generator=draw) / features**0.5

    shapes = emulator.target_shapes(model, plan)
    return CoreBasis(
        {name: (side(o), side(i)) for name, (o, i) in shapes.items()},
        base_hash="b" * 64,
        fan_in_fan_out=plan.fan_in_fan_out,
    )


def a_start(basis: CoreBasis, *, own: int = 0, seed: int = 2) -> CoreInBasis:
    draw = torch.Generator().manual_seed(seed)
    made = cores.zero(basis)
    spread = {name: 0.3 * torch.randn(one.shape, generator=draw) for name, one in made.cores.items()}
    beside = {
        name: LoraPair(0.2 * torch.randn(own, i, generator=draw), 0.2 * torch.randn(o, own, generator=draw))
        for name, (o, i) in (basis.module_shapes().items() if own else ())
    }
    return CoreInBasis(dataclasses.replace(made, cores=spread, own=beside), basis)


def plain_loss(model: PreTrainedModel, deltas: dict[str, Tensor], blocks: Sequence[Block]) -> Tensor:
    """Through a copy of the whole model whose weights are W + D, dense, its logits at every position."""
    ids, mask, labels = collate(blocks, pad_id=PAD)
    weights = {}
    for name, delta in deltas.items():
        turned = delta.mT if model.config.model_type == "gpt2" else delta  # which stores (i, o)
        weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight") + turned
    asked = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = torch.func.functional_call(model, weights, kwargs=asked).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    )


def test_the_gradient_of_a_core_is_that_of_the_dense_matrix_told_in_the_basis(
    tiny_model: PreTrainedModel,
) -> None:
    blocks = make_blocks(9, 5, 12)
    plan, top = bench(tiny_model)
    start = a_start(basis_of(tiny_model, plan, 5), own=2)
    trained = train.Trained([start], plan, top.device)
    (loss,) = train.backward_each(
        top, [states(tiny_model, plan, blocks)], lambda row: trained.attached(top.model, row)
    )
    whole = emulator.with_layers(tiny_model, plan.emulator)
    own = emulator.renumbered(
        start.basis.sides, plan.path, {number: at for at, number in enumerate(plan.emulator)}
    )
    dense = {n: p.delta().requires_grad_() for n, p in start.to_lora().pairs.items()}
    expected = plain_loss(whole, {own[name]: delta for name, delta in dense.items()}, blocks)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    stacks = trained._stacks
    for name, delta in dense.items():
        (u, v), G, beside = start.basis.sides[name], delta.grad, start.core.own[name]
        assert G is not None and G.abs().max() > 0
        found = {side: getattr(stacks[name], side).grad[0] for side in ("core", "A", "B")}
        wanted = {"core": u.mT @ G @ v, "A": beside.B.mT @ G, "B": G @ beside.A.mT}
        for side, value in wanted.items():
            torch.testing.assert_close(found[side], value, rtol=1e-3, atol=1e-5)
        assert stacks[name].basis[0].grad is None


def test_a_core_in_the_full_basis_is_trained_as_the_full_matrix_is(tiny_llama: PreTrainedModel) -> None:
    blocks = make_blocks(8, 8, 8)
    plan, top = bench(tiny_llama)
    basis = basis_of(tiny_llama, plan, None)
    before = copy.deepcopy(basis.sides)
    options = TrainOptions(steps=4, batch_size=3, learning_rate=1e-3, b_ratio=3.0)
    result = train.fit(
        top,
        plan,
        states(tiny_llama, plan, blocks),
        start=CoreInBasis(cores.zero(basis), basis),
        options=options,
    )
    whole = emulator.with_layers(tiny_llama, plan.emulator)
    own = emulator.renumbered(basis.sides, plan.path, {n: at for at, n in enumerate(plan.emulator)})
    deltas = {
        own[name]: torch.zeros(shape, requires_grad=True) for name, shape in basis.core_shapes().items()
    }
    optimizer = torch.optim.AdamW(deltas.values(), lr=3e-3, weight_decay=0.0)
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss = plain_loss(whole, deltas, blocks)
        loss.backward()
        optimizer.step()
    assert result.last_loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, core in result.adapter.core.cores.items():
        # Adam takes the sign of a gradient that is nothing but round-off: few entries, and none far
        assert (core - deltas[own[name]]).abs().max() < 1e-3
    for name, (u, v) in basis.sides.items():  # bit for bit what they were
        assert torch.equal(u, before[name][0]) and torch.equal(v, before[name][1])


def test_training_a_core_lowers_the_loss_of_its_own_ordinary_adapter(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    cached = states(tiny_llama, plan, make_blocks(9, 11, 12))
    basis = basis_of(tiny_llama, plan, 6)
    options = TrainOptions(steps=12, learning_rate=1e-2)
    result = train.fit(top, plan, cached, start=CoreInBasis(cores.zero(basis), basis), options=options)
    lora = result.adapter.to_lora()
    base, own = (train.mean_loss(top, plan, cached, adapter=one) for one in (None, lora))
    assert result.first_loss == pytest.approx(base, abs=1e-5) and own < base - 0.05


def test_a_core_is_drawn_back_to_its_start_as_a_lora_is(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    cached = states(tiny_llama, plan, make_blocks(9, 11))
    start = a_start(basis_of(tiny_llama, plan, 4), own=1)
    found = []
    for weight in (0.0, 50.0):
        options = TrainOptions(steps=8, learning_rate=1e-2, prox_weight=weight)
        ended = train.fit(top, plan, cached, start=start, options=options).adapter.to_lora()
        found.append(float(train.proximal(ended.pairs, start.to_lora().pairs)))
    assert 0 < found[1] < found[0] / 2


# ---- many at once


def alone(
    model: PreTrainedModel,
    texts: Sequence[Sequence[Block]],
    starts: Sequence[CoreInBasis],
    options: TrainOptions,
) -> list[tuple[list[float], CoreAdapter]]:
    plan, top = bench(model)
    found = []
    for blocks, start in zip(texts, starts, strict=True):
        training = train.Training(top, plan, states(model, plan, blocks), start=start, options=options)
        training.advance(options.steps)
        found.append((training.losses, training.adapter().core))
    return found


def test_users_trained_together_have_the_losses_and_cores_they_have_alone(
    tiny_model: PreTrainedModel,
) -> None:
    texts = [make_blocks(5, 9, 7, seed=1), make_blocks(14, seed=2), make_blocks(6, 6, 11, 4, 8, seed=3)]
    plan, top = bench(tiny_model)
    basis = basis_of(tiny_model, plan, 4)
    starts = [a_start(basis, own=2, seed=seed) for seed in range(3)]
    options = TrainOptions(steps=5, batch_size=2, learning_rate=1e-3, prox_weight=0.01)
    together = Together(
        top, plan, [states(tiny_model, plan, blocks) for blocks in texts], starts=starts, options=options
    )
    together.advance(options.steps)
    for user, (losses, core) in enumerate(alone(tiny_model, texts, starts, options)):
        assert [step[user] for step in together.losses] == pytest.approx(losses, abs=1e-5)
        for name, tensor in together.adapter(user).core.tensors().items():
            torch.testing.assert_close(tensor, core.tensors()[name], rtol=1e-3, atol=2e-4)


def test_a_user_learns_nothing_of_the_others(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    basis = basis_of(tiny_llama, plan, 4)
    options = TrainOptions(steps=3, batch_size=2)
    mine = states(tiny_llama, plan, make_blocks(9, 7, seed=1))
    ended = []
    for seed in (2, 3):
        others = states(tiny_llama, plan, make_blocks(9, 9, seed=seed))
        training = Together(
            top, plan, [mine, others], starts=[a_start(basis), a_start(basis, seed=seed)], options=options
        )
        training.advance(options.steps)
        ended.append(training)
    first, second = (training.adapter(0).core for training in ended)
    assert [step[0] for step in ended[0].losses] == pytest.approx(
        [step[0] for step in ended[1].losses], abs=1e-6
    )
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(tensor, second.tensors()[name], rtol=1e-4, atol=1e-5)


def test_ordinary_adapters_are_trained_together_just_so(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    texts = [states(tiny_llama, plan, make_blocks(5, 9, seed=seed)) for seed in (1, 2)]
    starts: list[LoraAdapter] = [a_start(basis_of(tiny_llama, plan, 3), seed=s).to_lora() for s in (1, 2)]
    options = TrainOptions(steps=3, batch_size=2)
    together = Together(top, plan, texts, starts=starts, options=options)
    together.advance(3)
    for user in (0, 1):
        single = train.fit(top, plan, texts[user], start=starts[user], options=options)
        assert together.losses[-1][user] == pytest.approx(single.last_loss, abs=1e-5)
        for name, pair in together.adapter(user).pairs.items():
            torch.testing.assert_close(pair.B, single.adapter.pairs[name].B, rtol=1e-3, atol=2e-4)


def test_who_cannot_be_trained_together_is_named(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    four, five = (basis_of(tiny_llama, plan, k) for k in (4, 5))
    with pytest.raises(AdapterError, match=r"user 1 of 2 trained together: the basis u-.*, the first has u-"):
        train.Trained([a_start(four), a_start(five)], plan, top.device)
    with pytest.raises(AdapterError, match="ranks of their own"):
        train.Trained([a_start(four), a_start(four, own=1)], plan, top.device)
    with pytest.raises(AdapterError, match="the rank 2, the first has 1"):
        train.Trained([a_start(four, own=1), a_start(four, own=2)], plan, top.device)


def test_of_many_users_a_pass_holds_as_many_numbers_whatever_the_width() -> None:
    one = train.tokens_at_once(32, 1, on="cpu")
    assert train.tokens_at_once(4096, 1, on="cpu") == one  # of one user as many tokens as ever
    assert train.tokens_at_once(32, 200, on="cpu") == 2 * train.tokens_at_once(64, 200, on="cpu") > one
    assert train.tokens_at_once(10**6, 200, on="cpu") == one  # and never fewer than that
    assert train.tokens_at_once(64, 200, on="cuda") > train.tokens_at_once(64, 200, on="cpu")
    assert train.tokens_at_once(64, 200, on="xpu") == train.tokens_at_once(64, 200, on="cpu")
