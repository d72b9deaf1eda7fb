"""Held-out loss: what the whole model would say, and what a user's figures mean."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter, LoraPair
from soppu.data import IGNORE, Block
from soppu.errors import AdapterError
from soppu.evaluate.losses import UserLosses, example_losses
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.emulator import TopModel
from soppu.federation.train import cache_states, mean_loss


def make_blocks() -> list[Block]:
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for length in (9, 4, 12, 6, 7):
        ids = torch.randint(2, 300, (length,), generator=generator)
        blocks.append(Block(ids, torch.where(torch.arange(length) < 2, IGNORE, ids)))
    return blocks


@pytest.mark.parametrize("with_adapter", [False, True])
def test_mean_loss_is_that_of_the_whole_model_token_by_token(
    tiny_model: PreTrainedModel, with_adapter: bool
) -> None:
    plan = emulator.make_plan(tiny_model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.34)
    generator = torch.Generator().manual_seed(1)
    pairs = {
        name: LoraPair(torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator))
        for name, (o, i) in emulator.target_shapes(tiny_model, plan).items()
    }
    adapter = LoraAdapter(pairs) if with_adapter else None
    blocks = make_blocks()
    top = TopModel(tiny_model, plan)
    cached = cache_states(emulator.with_layers(tiny_model, plan.bottom), blocks, pad_id=1)

    summed, count = 0.0, 0
    with torch.no_grad(), attached(tiny_model, adapter):
        for block in blocks:
            logits = tiny_model(input_ids=block.ids[None]).logits[0].log_softmax(-1)
            for t in range(2, len(block.ids)):
                summed, count = summed - float(logits[t - 1, block.ids[t]]), count + 1
    for batch_size in (1, 2, 8):
        found = mean_loss(top, plan, cached, adapter=adapter, batch_size=batch_size)
        assert found == pytest.approx(summed / count, rel=1e-4)
        each = example_losses(top, plan, cached, adapter=adapter, batch_size=batch_size)
        assert [tokens for _, tokens in each] == [len(block.ids) - 2 for block in blocks]
        assert sum(loss for loss, _ in each) == pytest.approx(summed, rel=1e-4)
        alone = example_losses(top, plan, cached[2:3], adapter=adapter)
        assert each[2] == pytest.approx(alone[0], rel=1e-4)


def test_an_adapter_of_other_layers_is_refused(tiny_llama: PreTrainedModel) -> None:
    plan = emulator.make_plan(tiny_llama, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.34)
    cached = cache_states(emulator.with_layers(tiny_llama, plan.kept), make_blocks(), pad_id=1)
    wrong = LoraAdapter({"model.layers.4.self_attn.q_proj": LoraPair(torch.zeros(2, 32), torch.zeros(32, 2))})
    with pytest.raises(AdapterError, match="not one of"):
        mean_loss(TopModel(tiny_llama, plan), plan, cached, adapter=wrong)


@pytest.mark.parametrize(
    ("base", "personal", "compressed", "kept"),
    [
        (3.0, 2.0, 2.0, 1.0),  # lossless
        (3.0, 2.0, 2.25, 0.75),
        (3.0, 2.0, 3.0, 0.0),  # all of it lost
        (3.0, 2.0, 3.5, -0.5),  # worse than no adapter
        (3.0, 2.0, 1.5, 1.5),  # better than the user's own
        (3.0, 3.0, 2.5, 0.0),  # there was nothing to keep
        (3.0, 3.5, 3.5, 0.0),
    ],
)
def test_gain_kept(base: float, personal: float, compressed: float, kept: float) -> None:
    losses = UserLosses("alice", 4, base, personal, compressed)
    assert losses.gain == base - personal
    assert losses.gain_kept == pytest.approx(kept)
