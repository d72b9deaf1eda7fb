"""LoRA by hooks: the same answer as PEFT's, and no trace of it afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError
from soppu.federation import emulator
from soppu.federation.attach import attached, initial_pairs

IDS = torch.tensor([[5, 17, 200, 9, 33]])


def random_adapter(model: PreTrainedModel, *, ranks: tuple[int, ...] = (4,)) -> LoraAdapter:
    """On the default targets of the last two layers; `ranks` in turn over the modules."""
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.2)
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for number, (name, (o, i)) in enumerate(sorted(emulator.target_shapes(model, plan).items())):
        rank = ranks[number % len(ranks)]
        pairs[name] = LoraPair(
            torch.randn(rank, i, generator=generator) * 0.2, torch.randn(o, rank, generator=generator) * 0.2
        )
    return LoraAdapter(pairs, base_hash="b" * 64, fan_in_fan_out=plan.fan_in_fan_out)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("ranks", [(4,), (1, 5, 3)], ids=["one rank", "many ranks"])
def test_attached_equals_peft(tiny_model: PreTrainedModel, tmp_path: Path, ranks: tuple[int, ...]) -> None:
    adapter = random_adapter(tiny_model, ranks=ranks)
    adapters.write(adapter, tmp_path)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path).eval())
    before = logits(tiny_model)
    with attached(tiny_model, adapter):
        found = logits(tiny_model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


def test_the_model_is_itself_again_afterwards(tiny_model: PreTrainedModel) -> None:
    before = logits(tiny_model)
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    with attached(tiny_model, random_adapter(tiny_model)):
        assert hooks(tiny_model) == len(random_adapter(tiny_model).pairs)
        logits(tiny_model)
    assert hooks(tiny_model) == 0
    assert torch.equal(logits(tiny_model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_model.state_dict().items())


def test_hooks_go_when_the_block_fails(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), attached(tiny_llama, random_adapter(tiny_llama)):
        raise ZeroDivisionError
    assert hooks(tiny_llama) == 0


def test_an_unknown_module_is_named_and_leaves_no_hook(tiny_llama: PreTrainedModel) -> None:
    good = random_adapter(tiny_llama)
    pair = next(iter(good.pairs.values()))
    bad = LoraAdapter({**good.pairs, "model.layers.99.self_attn.q_proj": pair})
    with pytest.raises(AdapterError, match=r"layers\.99\.self_attn\.q_proj: the model has no such module"):
        with attached(tiny_llama, bad):
            pytest.fail("the block must not run")
    assert hooks(tiny_llama) == 0


def test_none_attaches_nothing(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    with attached(tiny_llama, None):
        assert hooks(tiny_llama) == 0
        assert torch.equal(logits(tiny_llama), before)


def test_gradients_reach_both_factors_and_nothing_else(tiny_llama: PreTrainedModel) -> None:
    adapter = random_adapter(tiny_llama)
    for pair in adapter.pairs.values():
        pair.A.requires_grad_()
        pair.B.requires_grad_()
    with attached(tiny_llama, adapter):
        tiny_llama(input_ids=IDS, labels=IDS).loss.backward()
    for pair in adapter.pairs.values():
        assert pair.A.grad is not None and pair.A.grad.abs().max() > 0
        assert pair.B.grad is not None and pair.B.grad.abs().max() > 0
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_a_float32_adapter_serves_a_bfloat16_model(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    adapter = random_adapter(model)
    with attached(model, adapter):
        exact = logits(model)
    model.bfloat16()
    before = logits(model)
    with attached(model, adapter):
        found = logits(model)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.2 * (before.float() - exact).norm()


# ---- what everybody starts from


def test_every_client_starts_from_the_same_a_and_no_change(tiny_llama: PreTrainedModel) -> None:
    shapes = {name: (o, i) for name, (o, _, i) in random_adapter(tiny_llama).shapes().items()}
    pairs = initial_pairs(shapes, rank=4, seed=7)
    again = initial_pairs(dict(reversed(shapes.items())), rank=4, seed=7)
    other = initial_pairs(shapes, rank=4, seed=8)
    for name, (o, i) in shapes.items():
        assert pairs[name].A.shape == (4, i) and pairs[name].B.shape == (o, 4)
        assert not pairs[name].B.any()
        assert torch.equal(pairs[name].A, again[name].A)
        assert not torch.equal(pairs[name].A, other[name].A)
    with attached(tiny_llama, LoraAdapter(pairs)):
        changed = logits(tiny_llama)
    assert torch.equal(changed, logits(tiny_llama))


def test_a_is_spread_as_pefts_kaiming_uniform() -> None:
    shapes = {"module": (8, 256)}
    A = initial_pairs(shapes, rank=400, seed=0)["module"].A
    reference = torch.empty(400, 256)
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert A.abs().max() <= 256**-0.5
    assert A.abs().max() == pytest.approx(float(reference.abs().max()), rel=1e-3)
    assert float(A.std()) == pytest.approx(float(reference.std()), rel=1e-2)
    assert abs(float(A.mean())) < 1e-3
