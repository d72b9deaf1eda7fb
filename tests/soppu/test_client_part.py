"""A client's part of a model: the same numbers as the whole model's layers, and nothing else read or kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.config import AlignConfig
from soppu.data import Block
from soppu.errors import MissingExtra, ModelError, UnsupportedModel
from soppu.federation import emulator
from soppu.federation.align import Aligner
from soppu.federation.attach import attached
from soppu.federation.client_part import ClientPart
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import cache_states
from soppu.models import BaseModel
from soppu.module_names import split_layer
from tests.soppu.test_emulator import merge
from tests.thorough import thorough

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def saved(model: PreTrainedModel, folder: Path, *, shard: str = "5GB") -> BaseModel:
    model.save_pretrained(folder, max_shard_size=shard)
    return models.resolve(str(folder), cache=folder)


def make_plan(model: PreTrainedModel, base: BaseModel) -> LayerPlan:
    return emulator.make_plan(model, base_hash=base.hash, adapter_layers=2, drop_ratio=0.34)


def emulator_lora(model: PreTrainedModel, plan: LayerPlan, *, spread: float = 0.2) -> LoraAdapter:
    generator = torch.Generator().manual_seed(1)
    pairs = {
        name: LoraPair(
            torch.randn(2, i, generator=generator) * 0.2, torch.randn(o, 2, generator=generator) * spread
        )
        for name, (o, i) in emulator.target_shapes(model, plan, plan.kept).items()
    }
    return emulator.to_own(LoraAdapter(pairs, base_hash=plan.base_hash), plan, plan.kept)


@torch.no_grad()
def outputs(bottom: PreTrainedModel, top: TopModel) -> tuple[Tensor, Tensor]:
    below = emulator.bottom_states(bottom, IDS, MASK)
    return below, top.logits(top.hidden(below, MASK))


def rewrite(base: BaseModel, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> BaseModel:
    (path,) = base.path.glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return models.resolve(str(base.path), cache=base.path)


# ---- what is read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", *thorough("qwen2", "gpt_neox", "opt")])
def test_it_computes_what_the_layers_of_the_whole_model_compute(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, family: str, dtype: str
) -> None:
    base = saved(make_model(family), tmp_path / "base", shard="30KB")
    assert len(list(base.path.glob("*.safetensors"))) > 3
    whole = models.load_model(base, dtype=dtype)
    plan = make_plan(whole, base)
    compute = models.computing("auto", dtype)
    part = ClientPart(base, plan, dtype=dtype, compute=compute)
    wanted = outputs(emulator.with_layers(whole, plan.kept), TopModel(whole, plan, dtype=compute))
    with part.bottom() as bottom:
        found = outputs(bottom, part.top)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert part.shapes == emulator.target_shapes(whole, plan)
    assert {p.dtype for p in part.top.model.parameters()} == {compute}


def test_a_part_needs_no_tensor_of_a_dropped_layer(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model("llama")
    base = saved(model, tmp_path / "base")
    plan = make_plan(model, base)
    with ClientPart(base, plan).bottom() as bottom:
        before = emulator.bottom_states(bottom, IDS, MASK)

    def without_dropped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        dropped = set(range(8)) - set(plan.emulator)
        assert dropped == {2, 4}
        return {n: t for n, t in tensors.items() if not (p := split_layer(n)) or p[1] not in dropped}

    part = ClientPart(rewrite(base, without_dropped), plan)
    with part.bottom() as bottom:
        assert torch.equal(emulator.bottom_states(bottom, IDS, MASK), before)


def test_a_tensor_that_is_needed_and_absent_is_named(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model("llama")
    base = saved(model, tmp_path / "base")
    plan = make_plan(model, base)
    lost = "model.layers.3.mlp.up_proj.weight"
    part = ClientPart(rewrite(base, lambda all_: {n: t for n, t in all_.items() if n != lost}), plan)
    with pytest.raises(ModelError, match=rf"no tensor {lost} in .*download it again"), part.bottom():
        pass
    base = rewrite(base, lambda all_: {**all_, lost: torch.zeros(3, 32)})
    with pytest.raises(ModelError, match=rf"{lost}: the file has \(3, 32\)"), ClientPart(base, plan).bottom():
        pass


def test_a_file_that_is_no_safetensors_file_is_a_model_error(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model("llama")
    base = saved(model, tmp_path / "base")
    plan = make_plan(model, base)
    (base.path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="cannot read its weights"):
        ClientPart(base, plan)


def test_names_without_the_base_models_prefix_are_read_too(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """As gpt2 lies on the hub."""
    model = make_model("gpt2")
    base = saved(model, tmp_path / "base")
    plan = make_plan(model, base)
    wanted = outputs(emulator.with_layers(model, plan.kept), TopModel(model, plan))
    base = rewrite(base, lambda all_: {n.removeprefix("transformer."): t for n, t in all_.items()})
    part = ClientPart(base, plan)
    with part.bottom() as bottom:
        found = outputs(bottom, part.top)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_and_is_there_once(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, tied: bool
) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    base = saved(model, tmp_path / "base")
    assert ("lm_head.weight" in load_file(base.path / "model.safetensors")) is not tied
    plan = make_plan(model, base)
    part = ClientPart(base, plan)
    head = part.top.model.get_output_embeddings().weight
    with part.bottom() as bottom:
        found = outputs(bottom, part.top)
        embedding = bottom.get_input_embeddings().weight
        assert (embedding.data_ptr() == head.data_ptr()) is tied
    wanted = outputs(emulator.with_layers(model, plan.kept), TopModel(model, plan))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    del embedding
    assert not head.is_meta and head.abs().sum() > 0  # it outlives the emulator


def test_the_emulators_weights_are_there_for_the_block_alone(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model("llama")
    base = saved(model, tmp_path / "base")
    part = ClientPart(base, make_plan(model, base))
    with part.bottom() as bottom:
        first = emulator.bottom_states(bottom, IDS, MASK)
        assert not any(p.is_meta for p in bottom.get_decoder().layers.parameters())
    assert all(p.is_meta for p in bottom.parameters())
    with pytest.raises(ZeroDivisionError), part.bottom():
        raise ZeroDivisionError
    with part.bottom() as bottom:
        assert torch.equal(emulator.bottom_states(bottom, IDS, MASK), first)


# ---- the emulator's LoRA


def test_in_bf16_a_clients_states_are_the_servers_and_merging_loses_the_lora(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """A LoRA of alignment is small beside the weights: half of it is below a bf16 weight's last bit."""
    base = saved(make_model("llama"), tmp_path / "base")
    whole = models.load_model(base, dtype="bfloat16")
    plan = make_plan(whole, base)
    lora = emulator_lora(whole, plan, spread=0.0005)
    student = emulator.with_layers(whole, plan.kept)
    blocks = [Block(row, row) for row in IDS]

    def states(bottom: PreTrainedModel) -> Tensor:
        return torch.cat([block.states for block in cache_states(bottom, blocks, pad_id=1)]).float()

    with attached(student, lora):
        server = states(student)
    with ClientPart(base, plan, dtype="bfloat16").bottom(lora) as bottom:
        assert torch.equal(states(bottom), server)
    merged = emulator.with_layers(whole, plan.kept)
    merge(merged, lora)
    assert not torch.equal(states(merged), server)
    name = next(iter(lora.pairs))
    kept = (merged.get_submodule(name).weight - whole.get_submodule(name).weight).float()
    wanted = lora.pairs[name].delta()
    assert (kept - wanted).norm() > 0.5 * wanted.norm()


# ---- 4 bits


@pytest.fixture
def llama(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama", hidden_size=64, intermediate_size=128)


def test_nf4_layers_are_a_quarter_and_compute_nearly_the_same(llama: PreTrainedModel, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = saved(llama, tmp_path / "base")
    plan = make_plan(llama, base)
    states = {}
    for dtype in ("bfloat16", "nf4"):
        part = ClientPart(base, plan, dtype=dtype, compute=torch.bfloat16)
        with part.bottom() as bottom:
            states[dtype] = emulator.bottom_states(bottom, IDS, MASK)[MASK.bool()].float()
    off = (states["nf4"] - states["bfloat16"]).norm() / states["bfloat16"].norm()
    assert 0.01 < off < 0.5
    layers = emulator.decoder_layers(bottom)
    assert not any(isinstance(module, nn.Linear) for module in layers.modules())
    held = sum(t.nbytes for t in (*layers.parameters(), *layers.buffers()))
    full = sum(2 * t.numel() for t in emulator.decoder_layers(llama)[:4].parameters())
    assert held < 0.3 * full
    assert not any(p.is_meta for p in bottom.get_decoder().parameters())  # made once
    with part.bottom() as again:
        assert torch.equal(emulator.bottom_states(again, IDS, MASK)[MASK.bool()].float(), states["nf4"])


def test_the_server_aligns_the_very_layers_that_clients_hold(llama: PreTrainedModel, tmp_path: Path) -> None:
    """In 4 bits too: gradients pass through the quantised layers, and its LoRA makes up for them."""
    pytest.importorskip("bitsandbytes")
    base = saved(llama, tmp_path / "base")
    whole = models.load_model(base, dtype="nf4")
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    plan = make_plan(whole, base)
    options = AlignConfig(batch_size=2, rank=4, learning_rate=3e-3)
    aligner = Aligner(whole, plan, options=options, pad_id=1, seed=0, compute=torch.bfloat16, nf4=True)
    aligner.observe([Block(row, row) for row in IDS], [Block(row, row) for row in IDS])
    before = aligner.measure()
    list(aligner.steps(15))
    assert aligner.measure().l2 < 0.8 * before.l2
    own = emulator.to_own(aligner.adapter(), plan, plan.kept)
    with attached(aligner._student, own), torch.no_grad():
        server = emulator.bottom_states(aligner._student, IDS, MASK)
    with ClientPart(base, plan, dtype="nf4").bottom(own) as bottom, torch.no_grad():
        assert torch.equal(emulator.bottom_states(bottom, IDS, MASK), server)


def test_nf4_says_what_it_needs_and_what_it_cannot(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("llama", "gpt2"):
        model = make_model(family)
        base = saved(model, tmp_path / family)
        plan = make_plan(model, base)
        part = ClientPart(base, plan, dtype="nf4", compute=torch.bfloat16)
        with monkeypatch.context() as patch:
            if family == "llama":
                patch.setitem(sys.modules, "bitsandbytes", None)
                with (
                    pytest.raises(MissingExtra, match=r"bitsandbytes: pip install 'soppu\[nf4\]'"),
                    part.bottom(),
                ):
                    pass
            else:
                with pytest.raises(UnsupportedModel, match="c_attn is a Conv1D"), part.bottom():
                    pass
