"""The workbench: the emulator and nothing beyond it, aligned by what came last, its states kept a while."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clients import workbench as benches
from clients.workbench import Workbench
from soppu import config as configuration
from soppu import data, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.config import Config
from soppu.errors import AdapterError, FederationError
from soppu.federation import emulator
from soppu.federation.attach import attached, initial_pairs
from soppu.federation.emulator import LayerPlan
from soppu.federation.train import cache_states

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

USERS = {"alice": 12, "bob": 9, "carol": 8, "dave": 8, "erin": 8}


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, write_users: Callable[[Path, Mapping[str, int]], Path]) -> Config:
    source = write_users(tmp_path / "users", USERS)
    sizes = {"train_examples": 5, "validation_examples": 2, "min_examples": 4, "max_tokens": 64}
    return configuration.from_dict(
        {"base": {"model": str(tiny_base)}, "data": {"source": str(source), **sizes}, "lora": {"rank": 2}}
    )


def make_plan(model: PreTrainedModel, folder: Path) -> LayerPlan:
    base = models.resolve(str(folder), cache=folder)
    return emulator.make_plan(model, base_hash=base.hash, adapter_layers=2, drop_ratio=0.34)


@pytest.fixture
def plan(tiny_llama: PreTrainedModel, tiny_base: Path) -> LayerPlan:
    return make_plan(tiny_llama, tiny_base)


def emulator_lora(model: PreTrainedModel, plan: LayerPlan, *, seed: int) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(
            torch.randn(2, i, generator=generator) * 0.2, torch.randn(o, 2, generator=generator) * 0.2
        )
        for name, (o, i) in emulator.target_shapes(model, plan, plan.kept).items()
    }
    return LoraAdapter(pairs, base_hash=plan.base_hash)


def test_states_are_those_of_the_emulator_with_its_lora(
    config: Config, plan: LayerPlan, tiny_llama: PreTrainedModel
) -> None:
    bench = Workbench(config, plan)
    lora = emulator_lora(tiny_llama, plan, seed=1)
    bench.align(lora)
    found = bench.states("alice")
    bottom = emulator.with_layers(tiny_llama, plan.kept)
    for part in ("train", "validation"):
        blocks = data.tokenize(getattr(found.user, part), bench.tokenizer, max_tokens=64)
        with attached(bottom, emulator.to_own(lora, plan, plan.kept)):
            wanted = cache_states(bottom, blocks, pad_id=1)
        for ours, theirs in zip(getattr(found, part), wanted, strict=True):
            torch.testing.assert_close(ours.states, theirs.states, rtol=1e-4, atol=1e-4)
            assert torch.equal(ours.labels, theirs.labels)
    assert (len(found.train), len(found.validation)) == (5, 2)


def test_a_new_alignment_drops_old_states_and_starts_from_the_bare_layers(
    config: Config, plan: LayerPlan, tiny_llama: PreTrainedModel
) -> None:
    bench = Workbench(config, plan)
    first, second = (emulator_lora(tiny_llama, plan, seed=seed) for seed in (1, 2))
    bench.align(first)
    once = bench.states("alice").train[0].states
    bench.align(second)
    other = bench.states("alice").train[0].states
    bench.align(first)
    again = bench.states("alice").train[0].states
    assert not torch.allclose(once, other)
    assert torch.equal(once, again)  # merged into the bare layers, not on top of the last


def test_the_same_alignment_keeps_the_states(
    config: Config, plan: LayerPlan, tiny_llama: PreTrainedModel
) -> None:
    bench = Workbench(config, plan)
    bench.align(emulator_lora(tiny_llama, plan, seed=1))
    states = bench.states("alice")
    bench.align(emulator_lora(tiny_llama, plan, seed=1))
    assert bench.states("alice") is states


def test_only_the_last_few_users_are_kept_where_more_do_not_fit(
    config: Config, plan: LayerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(config, plan)
    first = {user: bench.states(user) for user in USERS}
    assert len(USERS) == benches.KEEP_STATES + 1
    assert all(bench.states(user) is first[user] for user in USERS)
    monkeypatch.setattr(benches, "KEEP_BYTES", sum(states.bytes for states in first.values()) - 1)
    bench = Workbench(config, plan)
    first = {user: bench.states(user) for user in USERS}
    assert bench.states("erin") is first["erin"]
    assert bench.states("alice") is not first["alice"]  # the oldest made room, and is read again
    assert all(
        torch.equal(a.states, b.states)
        for a, b in zip(bench.states("alice").train, first["alice"].train, strict=True)
    )


def test_a_loss_is_measured_once_as_long_as_the_states_are_there(
    config: Config, plan: LayerPlan, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, asked = Workbench(config, plan), []
    monkeypatch.setattr(benches, "mean_loss", lambda *_, adapter: asked.append(adapter) or len(asked))
    states, shapes = bench.states("alice"), bench.shapes
    one, other = (LoraAdapter(initial_pairs(shapes, rank=2, seed=seed)) for seed in (1, 2))
    told = [bench.validation_loss(states, adapter) for adapter in (None, one, other, one, None)]
    assert told == [1, 2, 3, 2, 1] and len(asked) == 3
    bench.align(emulator_lora(tiny_llama, plan, seed=1))  # the states are others then, and so is the loss
    assert bench.validation_loss(bench.states("alice"), one) == 4


def test_another_base_model_is_refused(config: Config, plan: LayerPlan) -> None:
    other = LayerPlan(**{**vars(plan), "base_hash": "f" * 64})
    with pytest.raises(FederationError, match="the plan is for ffffffffffff"):
        Workbench(config, other)


def test_an_emulator_lora_of_other_layers_is_refused(
    config: Config, plan: LayerPlan, tiny_llama: PreTrainedModel
) -> None:
    bench = Workbench(config, plan)
    lora = emulator_lora(tiny_llama, plan, seed=1)
    with pytest.raises(AdapterError, match="emulator adapter: .*not one of"):
        bench.align(emulator.to_own(lora, plan, plan.kept))  # 0 1 2 3 instead of 0 1 3 5


def test_the_layers_the_emulator_drops_are_not_kept_in_memory(
    tmp_path: Path,
    config: Config,
    make_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The client's share: the adapter layers, and the emulator's while states are made."""
    model = make_model("llama", seed=99)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    plan = make_plan(model, tmp_path / "base")
    layers = emulator.decoder_layers(model)
    marks = {number: layer.self_attn.q_proj.weight.clone().numpy() for number, layer in enumerate(layers)}
    del model, layers
    own = configuration.from_dict(configuration.to_dict(config) | {"base": {"model": str(tmp_path / "base")}})
    bench = Workbench(own, plan)

    def held() -> set[int]:
        gc.collect()
        alive = [item for item in gc.get_objects() if type(item) is nn.Parameter and not item.is_meta]
        alike = [item for item in alive if item.shape == (32, 32)]
        return {
            n for n, mark in marks.items() if any(torch.equal(item, torch.from_numpy(mark)) for item in alike)
        }

    assert held() == set(plan.adapter) == {6, 7}
    with bench._part.bottom():
        assert held() == set(plan.emulator) == {0, 1, 3, 5, 6, 7}
    bench.states("alice")
    assert held() == {6, 7}
    assert bench.shapes


def test_one_workbench_a_process_until_configuration_or_plan_change(config: Config, plan: LayerPlan) -> None:
    benches.workbench.cache_clear()
    one = benches.workbench(config, plan)
    same = configuration.from_dict(configuration.to_dict(config))
    assert benches.workbench(same, LayerPlan.from_json(plan.to_json())) is one
    changed = configuration.from_dict(configuration.to_dict(config) | {"seed": 1})
    assert benches.workbench(changed, plan) is not one
    benches.workbench.cache_clear()
