"""The split and its numbering: every family, both directions, and the wrong number that must not pass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.data import Block
from soppu.errors import AdapterError, UnsupportedModel
from soppu.federation import emulator, wire
from soppu.federation.attach import attached
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import TrainOptions, cache_states, fit, mean_loss

BASE = "b" * 64
IDS = torch.tensor([[5, 17, 200, 9, 33, 34, 35, 2, 3], [8, 7, 6, 5, 4, 1, 1, 1, 1]])
MASK = (torch.arange(9)[None] < torch.tensor([[9], [5]])).long()


def make_plan(model: PreTrainedModel, *, drop: float = 0.34, adapter: int = 2) -> LayerPlan:
    """Of the eight layers: keeps 0 1 3 5, trains 6 7."""
    return emulator.make_plan(model, base_hash=BASE, adapter_layers=adapter, drop_ratio=drop)


def random_adapter(shapes: dict[str, tuple[int, int]], *, rank: int = 3, seed: int = 0) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(
            torch.randn(rank, i, generator=generator) * 0.2, torch.randn(o, rank, generator=generator) * 0.2
        )
        for name, (o, i) in shapes.items()
    }
    return LoraAdapter(pairs, base_hash=BASE)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def layer_numbers(model: PreTrainedModel) -> list[set[int]]:
    """What the modules of each layer believe their number to be."""
    return [
        {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")}
        for layer in emulator.decoder_layers(model)
    ]


# ---- models of some layers


def test_with_layers_shares_every_tensor_and_leaves_the_model_alone(tiny_model: PreTrainedModel) -> None:
    before, numbers = logits(tiny_model), layer_numbers(tiny_model)
    clone = emulator.with_layers(tiny_model, (0, 2, 5, 7))
    ours = {t.data_ptr() for t in (*tiny_model.parameters(), *tiny_model.buffers())}
    theirs = {t.data_ptr() for t in (*clone.parameters(), *clone.buffers())}
    assert theirs < ours
    assert len(emulator.decoder_layers(clone)) == clone.config.num_hidden_layers == 4
    assert len(emulator.decoder_layers(tiny_model)) == tiny_model.config.num_hidden_layers == 8
    assert layer_numbers(tiny_model) == numbers
    assert all(found <= {own} for own, found in enumerate(layer_numbers(clone)))
    assert torch.equal(logits(tiny_model), before)


def test_with_layers_is_the_model_without_the_others(tiny_model: PreTrainedModel) -> None:
    """Slow reference: a deep copy whose other layers are put out of the list by hand."""
    kept = (0, 1, 3, 5, 6, 7)
    clone = emulator.with_layers(tiny_model, kept)
    reference = copy.deepcopy(tiny_model)
    path, _, leaf = emulator.SUPPORTED[reference.config.model_type][0].rpartition(".")
    layers = emulator.decoder_layers(reference)
    setattr(reference.get_submodule(path), leaf, nn.ModuleList(layers[n] for n in kept))
    reference.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        expected = reference(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(logits(clone)[MASK.bool()], expected[MASK.bool()])
    assert (logits(clone) - logits(tiny_model)).abs().max() > 1e-2


def test_nothing_dropped_is_the_model_itself(tiny_model: PreTrainedModel) -> None:
    plan = make_plan(tiny_model, drop=0.0)
    assert plan.emulator == tuple(range(8))
    assert torch.equal(logits(emulator.with_layers(tiny_model, plan.emulator)), logits(tiny_model))


def test_bottom_and_top_together_are_the_model(tiny_model: PreTrainedModel) -> None:
    plan = make_plan(tiny_model)
    top = TopModel(tiny_model, plan)
    with torch.no_grad():
        below = emulator.bottom_states(emulator.with_layers(tiny_model, plan.bottom), IDS, MASK)
        whole = top.logits(top.hidden(below, MASK))
    real = MASK.bool()
    torch.testing.assert_close(whole[real], logits(tiny_model)[real], rtol=1e-4, atol=1e-5)


def test_emulator_and_top_together_are_the_emulator_model(tiny_model: PreTrainedModel) -> None:
    plan = make_plan(tiny_model)
    top = TopModel(tiny_model, plan)
    with torch.no_grad():
        below = emulator.bottom_states(emulator.with_layers(tiny_model, plan.kept), IDS, MASK)
        whole = top.logits(top.hidden(below, MASK))
    expected = logits(emulator.with_layers(tiny_model, plan.emulator))
    torch.testing.assert_close(whole[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_cached_generation_of_a_thinned_model_is_the_same_as_without_cache(
    tiny_model: PreTrainedModel,
) -> None:
    clone = emulator.with_layers(tiny_model, (0, 3, 7))
    prompt = torch.tensor([[5, 17, 200]])
    out = clone.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    ids = prompt
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, clone(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert out.tolist() == ids.tolist()


def test_layer_types_move_with_their_layers(make_model: Callable[..., PreTrainedModel]) -> None:
    """Qwen2 picks a sliding or a full mask by number: a list left whole would give the wrong one."""
    model = make_model("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=7)
    assert model.config.layer_types == ["full_attention"] * 7 + ["sliding_attention"]
    plan = make_plan(model)
    clone = emulator.with_layers(model, plan.emulator)
    assert clone.config.layer_types == ["full_attention"] * 5 + ["sliding_attention"]
    assert len(model.config.layer_types) == 8
    top = TopModel(model, plan)
    with torch.no_grad():
        below = emulator.bottom_states(emulator.with_layers(model, plan.bottom), IDS, MASK)
        whole = top.logits(top.hidden(below, MASK))
    torch.testing.assert_close(whole[MASK.bool()], logits(model)[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_a_scale_baked_into_gpt2s_layers_stays(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    plan = make_plan(model)
    top = TopModel(model, plan)
    with torch.no_grad():
        below = emulator.bottom_states(emulator.with_layers(model, plan.bottom), IDS, MASK)
        whole = top.logits(top.hidden(below, MASK))
    torch.testing.assert_close(whole[MASK.bool()], logits(model)[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_the_top_computes_in_float32_and_leaves_a_bfloat16_model_as_it_is(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = make_model("llama").bfloat16()
    top = TopModel(model, make_plan(model))
    assert {p.dtype for p in top.model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = make_model("llama")
    shared = {p.data_ptr() for p in exact.parameters()}
    assert {p.data_ptr() for p in TopModel(exact, make_plan(exact)).model.parameters()} < shared


# ---- plans


@pytest.mark.parametrize(
    ("adapter", "drop", "dropped"),
    [
        (2, 0.2, {4, 9, 14, 19, 24, 28}),
        (2, 0.5, set(range(30)) - {*range(0, 27, 2), 29}),
        (4, 0.2, {4, 8, 13, 17, 22, 26}),
        (4, 0.5, set(range(28)) - {*range(0, 25, 2), 27}),
        (4, 0.0, set()),
    ],
)
def test_kept_layers_follow_the_published_formula(
    make_model: Callable[..., PreTrainedModel], adapter: int, drop: float, dropped: set[int]
) -> None:
    with torch.device("meta"):
        model = make_model("llama", num_hidden_layers=32)
    plan = make_plan(model, adapter=adapter, drop=drop)
    assert set(plan.bottom) - set(plan.kept) == dropped
    assert plan.adapter == tuple(range(32 - adapter, 32))


@pytest.mark.parametrize("layers", [3, 5, 12, 24, 31])
def test_first_and_last_layer_always_survive(make_model: Callable[..., PreTrainedModel], layers: int) -> None:
    with torch.device("meta"):
        model = make_model("llama", num_hidden_layers=layers)
    for adapter in range(1, layers - 1):
        for drop in (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9):
            plan = make_plan(model, adapter=adapter, drop=drop)
            bottom = layers - adapter
            assert plan.kept[0] == 0 and plan.kept[-1] == bottom - 1
            assert list(plan.kept) == sorted(set(plan.kept))
            assert len(plan.kept) == min(bottom, max(2, round(bottom * (1 - drop))))
            assert plan.emulator[-adapter:] == plan.adapter


def test_a_plan_travels_as_json_and_its_hash_sees_every_field(tiny_llama: PreTrainedModel) -> None:
    plan = make_plan(tiny_llama)
    assert plan.kept == (0, 1, 3, 5) and plan.adapter == (6, 7)
    back = LayerPlan.from_json(plan.to_json())
    assert back == plan and back.hash == plan.hash and hash(back) == hash(plan)
    others = [
        dataclasses.replace(plan, model_type="qwen2"),
        dataclasses.replace(plan, base_hash="c" * 64),
        dataclasses.replace(plan, layers=9),
        dataclasses.replace(plan, adapter_layers=1),
        dataclasses.replace(plan, kept=(0, 1, 2, 5)),
        dataclasses.replace(plan, target_modules=("q_proj",)),
    ]
    assert len({item.hash for item in (plan, *others)}) == 7


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    return BertLMHeadModel(BertConfig(is_decoder=True, **sizes))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=4, vocab_size=8))


@pytest.mark.parametrize("build", [bert, mamba])
def test_other_families_are_refused_with_the_list(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    with pytest.raises(UnsupportedModel, match=f"'{model.config.model_type}' cannot be split") as caught:
        make_plan(model)
    assert all(family in str(caught.value) for family in emulator.SUPPORTED)


@pytest.mark.parametrize("adapter", [7, 8, 20])
def test_an_adapter_that_leaves_no_bottom_is_refused(tiny_llama: PreTrainedModel, adapter: int) -> None:
    with pytest.raises(
        UnsupportedModel, match=f"plan.adapter_layers: found {adapter}, at most 6 of 8 layers"
    ):
        make_plan(tiny_llama, adapter=adapter)


@pytest.mark.parametrize("name", ["qproj", "self_attn", "input_layernorm", "embed_tokens"])
def test_targets_without_a_weight_matrix_in_the_layers_are_refused(
    tiny_llama: PreTrainedModel, name: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"lora.target_modules: no {name} in llama layers"):
        emulator.make_plan(
            tiny_llama, base_hash=BASE, adapter_layers=2, drop_ratio=0.2, target_modules=("q_proj", name)
        )


def test_target_shapes_are_those_a_lora_of_that_layer_needs(tiny_model: PreTrainedModel) -> None:
    plan = make_plan(tiny_model)
    shapes = emulator.target_shapes(tiny_model, plan)
    assert {int(name.removeprefix(f"{plan.path}.").split(".")[0]) for name in shapes} == {6, 7}
    for name, (o, i) in shapes.items():
        module = tiny_model.get_submodule(name)
        assert module(torch.zeros(1, i)).shape == (1, o)
    assert {name.rsplit(".", 1)[-1] for name in shapes} == set(plan.target_modules)
    assert emulator.target_shapes(tiny_model, plan, (6, 7)) == shapes


# ---- numbers


@settings(max_examples=50)
@given(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True))
def test_full_to_own_and_back_changes_nothing(numbers: Sequence[int]) -> None:
    plan = LayerPlan("llama", BASE, 100, 2, (0, 97), ("q_proj",))
    adapter = random_adapter({f"model.layers.{n}.self_attn.q_proj": (4, 4) for n in numbers})
    own = emulator.to_own(adapter, plan, numbers)
    assert {name.split(".")[2] for name in own.pairs} == set(map(str, range(len(numbers))))
    back = emulator.to_full(own, plan, numbers)
    assert back.pairs.keys() == adapter.pairs.keys()
    assert all(back.pairs[name] is adapter.pairs[name] for name in adapter.pairs)
    assert back.base_hash == BASE


@pytest.mark.parametrize(
    "name", ["model.layers.4.self_attn.q_proj", "layers.6.self_attn.q_proj", "model.layers.66.x", "lm_head"]
)
def test_a_name_outside_the_mapping_is_refused(tiny_llama: PreTrainedModel, name: str) -> None:
    plan = make_plan(tiny_llama)
    with pytest.raises(AdapterError, match=f"alice: {name}: not one of model.layers.{{6, 7}}"):
        emulator.to_own(random_adapter({name: (4, 4)}), plan, plan.adapter, who="alice")


def test_numbers_are_replaced_in_the_layer_path_only() -> None:
    adapter = random_adapter({"model.layers.6.experts.6.6_proj": (4, 4)})
    own = emulator.renumber(adapter, "model.layers", {6: 1})
    assert list(own.pairs) == ["model.layers.1.experts.6.6_proj"]


def emulator_numbered(model: PreTrainedModel, plan: LayerPlan) -> LoraAdapter:
    """The classic bug: a client forgets to translate, and sends layers 4 and 5 for 6 and 7."""
    right = random_adapter(emulator.target_shapes(model, plan))
    wrong = emulator.to_own(right, plan, plan.emulator)
    assert {name.split(f"{plan.path}.")[1].split(".")[0] for name in wrong.pairs} == {"4", "5"}
    return wrong


def test_emulator_numbers_at_the_full_model_fail_loudly_at_every_door(tiny_model: PreTrainedModel) -> None:
    plan = make_plan(tiny_model)
    wrong = emulator_numbered(tiny_model, plan)
    shapes = emulator.target_shapes(tiny_model, plan)
    with pytest.raises(AdapterError, match="alice: .*not one of"):
        emulator.to_own(wrong, plan, plan.adapter, who="alice")
    with pytest.raises(AdapterError, match=r"alice: tensor .* is missing"):
        wire.from_state(wire.to_state(wrong), shapes, rank=3, who="alice")
    with pytest.raises(AdapterError, match="alice: .*the base model has no such module"):
        adapters.check_shapes(wrong, shapes, who="alice")


def test_why_it_has_to_be_loud(tiny_llama: PreTrainedModel) -> None:
    """Layers 4 and 5 exist too, so without the checks nothing stops it; the loss shows what it costs."""
    plan = make_plan(tiny_llama)
    generator = torch.Generator().manual_seed(1)
    blocks = [Block(ids, ids) for ids in torch.randint(2, 300, (6, 12), generator=generator)]
    states = cache_states(emulator.with_layers(tiny_llama, plan.bottom), blocks, pad_id=1)
    top = TopModel(tiny_llama, plan)
    zero = {
        name: LoraPair(torch.randn(4, i, generator=generator) * 0.2, torch.zeros(o, 4))
        for name, (o, i) in emulator.target_shapes(tiny_llama, plan).items()
    }
    start = LoraAdapter(zero, base_hash=BASE)
    right = fit(top, plan, states, start=start, options=TrainOptions(steps=40, learning_rate=1e-2)).adapter
    wrong = emulator.to_own(right, plan, plan.emulator)

    def loss(adapter: LoraAdapter | None) -> float:
        ids = torch.stack([block.ids for block in blocks])
        with torch.no_grad(), attached(tiny_llama, adapter):
            found = tiny_llama(input_ids=ids, labels=ids).loss
        return float(found)

    assert loss(right) == pytest.approx(mean_loss(top, plan, states, adapter=right), rel=1e-4)
    assert loss(right) < loss(None) - 1.0
    assert loss(wrong) > loss(right) + 1.0


# ---- merging


def merge(model: PreTrainedModel, adapter: LoraAdapter) -> None:
    """What attaching is held against: the change in the weights themselves."""
    for name, pair in adapter.pairs.items():
        module = model.get_submodule(name)
        delta = pair.delta() if isinstance(module, nn.Linear) else pair.delta().T
        weight = (module.weight.float() + delta).to(module.weight.dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)


def test_merged_equals_attached_and_shared_tensors_are_not_written_to(tiny_model: PreTrainedModel) -> None:
    clone = emulator.with_layers(tiny_model, range(8))
    plan = make_plan(tiny_model)
    adapter = random_adapter(emulator.target_shapes(tiny_model, plan, plan.bottom))
    with attached(tiny_model, adapter):
        expected = logits(tiny_model)
    before = logits(tiny_model)
    merge(clone, adapter)
    torch.testing.assert_close(logits(clone), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(tiny_model), before)
    assert not any(p.requires_grad for p in clone.parameters())
