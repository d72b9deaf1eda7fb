"""Alignment: it brings the emulator closer, counts real tokens only, and touches nothing but its own LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter, LoraPair
from soppu.config import AlignConfig
from soppu.data import Block
from soppu.federation import emulator
from soppu.federation.align import Aligner, AlignLoss
from soppu.federation.attach import attached

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

OPTIONS = AlignConfig(batch_size=2, rank=4, learning_rate=3e-3, kl_weight=0.05)


def make_blocks(*lengths: int, seed: int = 0) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)
    return [Block(ids, ids) for n in lengths for ids in [torch.randint(2, 300, (n,), generator=generator)]]


def make_aligner(
    model: PreTrainedModel, blocks: list[Block], *, drop: float = 0.34, seed: int = 0, **changes: float
) -> Aligner:
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=drop)
    options = AlignConfig(**{**vars(OPTIONS), **changes})  # type: ignore[arg-type]
    aligner = Aligner(model, plan, options=options, pad_id=1, seed=seed)
    aligner.observe(blocks, blocks)
    return aligner


def run(aligner: Aligner, steps: int, *, user_adapter: LoraAdapter | None = None) -> list[AlignLoss]:
    return list(aligner.steps(steps, user_adapter=user_adapter))


def random_user_adapter(model: PreTrainedModel, aligner: Aligner) -> LoraAdapter:
    generator = torch.Generator().manual_seed(9)
    pairs = {
        name: LoraPair(
            torch.randn(2, i, generator=generator) * 0.3, torch.randn(o, 2, generator=generator) * 0.3
        )
        for name, (o, i) in emulator.target_shapes(model, aligner.plan).items()
    }
    return LoraAdapter(pairs, base_hash="b" * 64)


def reference(
    model: PreTrainedModel, aligner: Aligner, blocks: list[Block], *, user: LoraAdapter | None = None
) -> AlignLoss:
    """Whole models, one block at a time and so no padding: FedBiOT's server loss as it is written down."""
    plan = aligner.plan
    model = emulator.with_layers(model, range(plan.layers))  # output_hidden_states leaves hooks behind
    student = emulator.with_layers(model, plan.emulator)
    inner = emulator.to_own(aligner.adapter(), plan, plan.emulator)
    outer = emulator.to_own(user, plan, plan.emulator) if user else None
    off, size, kl, tokens = 0.0, 0.0, 0.0, 0

    def states(whole: PreTrainedModel, ids: Tensor, depth: int) -> Tensor:
        return whole(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[depth][0]

    with torch.no_grad():
        for block in blocks:
            ids = block.ids[None]
            h_t = states(model, ids, len(plan.bottom))
            with attached(model, user):
                p_t = model(input_ids=ids).logits[0].log_softmax(-1)
            with attached(student, inner), attached(student, outer):
                h_s = states(student, ids, len(plan.kept))
                p_s = student(input_ids=ids).logits[0].log_softmax(-1)
            off, size = off + float((h_t - h_s).square().sum()), size + float(h_t.square().sum())
            kl += float((p_t.exp() * (p_t - p_s)).sum())
            tokens += len(block.ids)
    return AlignLoss(off / size, kl / tokens)


def test_the_losses_are_those_of_the_whole_models_and_padding_does_not_count(
    tiny_model: PreTrainedModel,
) -> None:
    blocks = make_blocks(12, 3, 7)
    aligner = make_aligner(tiny_model, blocks)
    run(aligner, 2)  # so that its LoRA is not zero
    found, wanted = aligner.measure(), reference(tiny_model, aligner, blocks)
    assert found.l2 == pytest.approx(wanted.l2, rel=1e-4)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-3)
    assert wanted.l2 > 0.01 and wanted.kl > 0.01


def test_both_sides_of_the_kl_term_carry_the_users_adapter(tiny_llama: PreTrainedModel) -> None:
    blocks = make_blocks(10)  # one block, so every batch is that block
    aligner = make_aligner(tiny_llama, blocks)
    user = random_user_adapter(tiny_llama, aligner)
    wanted, without = (
        reference(tiny_llama, aligner, blocks, user=user),
        reference(tiny_llama, aligner, blocks),
    )
    (found,) = run(aligner, 1, user_adapter=user)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-3)
    assert abs(wanted.kl - without.kl) > 0.005  # so the line above tells the two apart
    assert found.l2 == pytest.approx(wanted.l2, rel=1e-4) == pytest.approx(without.l2, rel=1e-4)


def test_an_emulator_that_drops_nothing_has_nothing_to_learn(tiny_model: PreTrainedModel) -> None:
    found = make_aligner(tiny_model, make_blocks(8, 5), drop=0.0).measure()
    assert found.l2 == pytest.approx(0.0, abs=1e-10) and found.kl == pytest.approx(0.0, abs=1e-6)


def test_alignment_brings_the_emulator_closer(tiny_model: PreTrainedModel) -> None:
    aligner = make_aligner(tiny_model, make_blocks(12, 12, 9, 12))
    before = aligner.measure()
    run(aligner, 25)
    after = aligner.measure()
    assert after.l2 < 0.8 * before.l2
    assert after.kl < before.kl


def test_only_its_own_lora_changes(tiny_llama: PreTrainedModel) -> None:
    aligner = make_aligner(tiny_llama, make_blocks(9, 6))
    weights = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    states = copy.deepcopy(aligner._states)
    user = random_user_adapter(tiny_llama, aligner)
    before = user.content_hash()
    run(aligner, 3, user_adapter=user)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_llama.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tiny_llama.parameters())
    assert LoraAdapter(user.pairs, base_hash="b" * 64).content_hash() == before
    aligner.observe(make_blocks(9, 6), make_blocks(9, 6))  # the teacher says the same as before
    assert all(torch.equal(a.states, b.states) for a, b in zip(states, aligner._states, strict=True))


def test_its_adapter_has_full_model_names_and_is_a_copy(tiny_llama: PreTrainedModel) -> None:
    aligner = make_aligner(tiny_llama, make_blocks(9, 6))
    adapter = aligner.adapter()
    assert {int(name.split(".")[2]) for name in adapter.pairs} == {0, 1, 3, 5}
    assert adapter.base_hash == "b" * 64
    before = adapter.content_hash()
    run(aligner, 2)
    assert LoraAdapter(adapter.pairs, base_hash="b" * 64).content_hash() == before
    assert aligner.adapter().content_hash() != before


def test_one_optimiser_lives_across_rounds(tiny_llama: PreTrainedModel) -> None:
    """Adam's moments survive: two calls of one step are one call of two."""
    one, two = (make_aligner(tiny_llama, make_blocks(9, 6, 8)) for _ in range(2))
    run(one, 4)
    for _ in range(2):
        run(two, 2)
    assert one.adapter().content_hash() == two.adapter().content_hash()


def test_the_seed_fixes_everything(tiny_llama: PreTrainedModel) -> None:
    hashes = []
    for seed in (1, 1, 2):
        aligner = make_aligner(tiny_llama, make_blocks(9, 6, 8), seed=seed)
        run(aligner, 2)
        hashes.append(aligner.adapter().content_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_load_continues_where_another_stopped_bit_for_bit(tiny_llama: PreTrainedModel) -> None:
    """Moments, count of steps and order of blocks too: the LoRA alone would go another way."""
    blocks = make_blocks(9, 6, 8)
    first, second = make_aligner(tiny_llama, blocks), make_aligner(tiny_llama, blocks, seed=4)
    run(first, 10)
    state = first.state()
    second.load(state)
    assert second.measure() == first.measure()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    losses = run(first, 5)
    assert run(second, 5) == losses
    assert second.adapter().content_hash() == first.adapter().content_hash()
    assert second.measure().l2 == first.measure().l2
    assert all(torch.equal(state[name], kept[name]) for name in kept)  # a copy on both sides
    only = make_aligner(tiny_llama, blocks, seed=4)
    only.load({name: tensor for name, tensor in state.items() if name.count("/") == 0})
    assert only.measure() != first.measure() and run(only, 5) != losses


def test_an_aligner_that_took_no_step_can_be_gone_on_from_too(tiny_llama: PreTrainedModel) -> None:
    blocks = make_blocks(9, 6, 8)
    first, second = make_aligner(tiny_llama, blocks), make_aligner(tiny_llama, blocks, seed=4)
    second.load(first.state())
    assert run(second, 3) == run(first, 3)
    first.load(second.state())  # back into one that is under way
    assert run(second, 3) == run(first, 3)


def test_without_a_kl_weight_only_the_states_count(tiny_llama: PreTrainedModel) -> None:
    losses = run(make_aligner(tiny_llama, make_blocks(9, 6), kl_weight=0.0), 2)
    assert [loss.kl for loss in losses] == [0.0, 0.0]
    assert all(loss.l2 > 0 for loss in losses)
