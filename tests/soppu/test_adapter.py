"""LoraAdapter: PEFT reads what we write, we read what PEFT writes, and the hash names what was read."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError
from soppu.federation import emulator
from soppu.federation.attach import attached
from tests.soppu.small_adapters import BASE, edit_tensors, logits, random_adapter, saved_by_peft, small


def shapes_of(model: PreTrainedModel, *, targets: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    plan = emulator.make_plan(model, base_hash=BASE, adapter_layers=2, drop_ratio=0.2, target_modules=targets)
    return emulator.target_shapes(model, plan)


# ---- writing and reading


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_our_folder_and_answers_as_attached_does(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    whole = random_adapter(shapes_of(model))
    adapter = LoraAdapter(whole.pairs, "tiny", BASE, fan_in_fan_out=family == "gpt2")
    adapters.write(adapter, tmp_path)
    with attached(model, adapter):
        ours = logits(model)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval())
    assert (ours - logits(model)).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_peft_loads_an_adapter_whose_ranks_differ(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    shapes = shapes_of(tiny_llama)
    pairs = {
        name: random_adapter({name: shape}, rank=2 + 3 * (number % 3), seed=number).pairs[name]
        for number, (name, shape) in enumerate(shapes.items())
    }
    adapter = LoraAdapter(pairs, "tiny", BASE)
    adapters.write(adapter, tmp_path)
    with attached(tiny_llama, adapter):
        ours = logits(tiny_llama)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path).eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_round_trip_is_exact_to_the_bit(tmp_path: Path) -> None:
    adapter = LoraAdapter(small().pairs, "hub/name", BASE, fan_in_fan_out=True)
    adapters.write(adapter, tmp_path)
    back = adapters.read(tmp_path)
    assert (back.base_model, back.base_hash, back.fan_in_fan_out) == ("hub/name", BASE, True)
    assert back.content_hash() == adapter.content_hash()
    assert back.parameters() == adapter.parameters() == 4 * (4 * 5 + 6 * 4)
    for name, pair in adapter.pairs.items():
        assert torch.equal(back.pairs[name].A, pair.A) and torch.equal(back.pairs[name].B, pair.B)


def test_bfloat16_survives_the_round_trip(tmp_path: Path) -> None:
    pairs = {name: LoraPair(pair.A.bfloat16(), pair.B.bfloat16()) for name, pair in small().pairs.items()}
    adapter = LoraAdapter(pairs, base_hash=BASE)
    adapters.write(adapter, tmp_path)
    back = adapters.read(tmp_path)
    assert back.content_hash() == adapter.content_hash()
    assert all(pair.A.dtype == torch.bfloat16 for pair in back.pairs.values())


# ---- the scale of PEFT's own folders


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 4},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.3\.mlp\.down_proj": 7}},
        {"alpha_pattern": {"q_proj": 1, r"layers\.3\.mlp\.down_proj": 50}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["alpha/r", "scale 1", "rslora", "rank_pattern", "alpha_pattern", "all"],
)
def test_a_folder_of_peft_reads_with_its_scale_folded_once(
    tiny_llama: PreTrainedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = saved_by_peft(tiny_llama, tmp_path / "theirs", **options)
    adapter = adapters.read(tmp_path / "theirs")
    with attached(tiny_llama, adapter):
        torch.testing.assert_close(logits(tiny_llama), theirs, rtol=1e-4, atol=1e-4)
    adapters.write(adapter, tmp_path / "ours")  # a second trip must not fold it again
    assert adapters.read(tmp_path / "ours").content_hash() == adapter.content_hash()
    again = logits(PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "ours").eval())
    torch.testing.assert_close(again, theirs, rtol=1e-4, atol=1e-4)


def test_the_scale_goes_into_b_alone(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path, use_rslora=True)
    stored = load_file(tmp_path / adapters.WEIGHTS_FILE)
    adapter = adapters.read(tmp_path)
    name = "model.layers.5.self_attn.q_proj"
    assert torch.equal(adapter.pairs[name].A, stored[f"base_model.model.{name}.lora_A.weight"])
    expected = stored[f"base_model.model.{name}.lora_B.weight"] * (12 / math.sqrt(4))
    assert torch.equal(adapter.pairs[name].B, expected)


def test_a_bfloat16_folder_is_folded_in_float32(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    """A bfloat16 product would lose digits; and both halves have to be of one type to be multiplied."""
    saved_by_peft(tiny_llama, tmp_path, lora_alpha=13)
    edit_tensors(tmp_path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    stored = load_file(tmp_path / adapters.WEIGHTS_FILE)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path).eval())
    adapter = adapters.read(tmp_path)
    for name, pair in adapter.pairs.items():
        assert torch.equal(pair.B, stored[f"base_model.model.{name}.lora_B.weight"].float() * (13 / 4))
        assert pair.delta().shape == (pair.B.shape[0], pair.A.shape[1])
    with attached(tiny_llama, adapter):
        torch.testing.assert_close(logits(tiny_llama), theirs, rtol=1e-4, atol=1e-4)


# ---- the content hash


def test_the_hash_does_not_depend_on_order_or_memory_layout() -> None:
    adapter = small()
    turned = LoraAdapter(dict(reversed(adapter.pairs.items())), base_hash=BASE)
    strided = {n: LoraPair(p.A.T.contiguous().T, p.B.T.contiguous().T) for n, p in adapter.pairs.items()}
    assert turned.content_hash() == adapter.content_hash()
    assert LoraAdapter(strided, base_hash=BASE).content_hash() == adapter.content_hash()


def test_the_hash_takes_factors_of_rank_one_in_any_layout() -> None:
    row = LoraPair(torch.arange(3.0).reshape(1, 3), torch.arange(4.0).reshape(4, 1))
    turned = LoraPair(row.A, row.B.reshape(1, 4).mT.contiguous())  # one column: contiguous with a stride of 4
    assert turned.B.stride() != row.B.stride()
    hashes = {LoraAdapter({"q": pair}, base_hash=BASE).content_hash() for pair in (row, turned)}
    assert len(hashes) == 1


def test_the_hash_is_the_same_today_and_tomorrow() -> None:
    pairs = {"model.layers.0.q_proj": LoraPair(torch.arange(6.0).reshape(2, 3), torch.ones(4, 2))}
    # Stored adapters are named by it: a change here orphans every registry.
    expected = "dd2ba1320420bed43175460262f8f8234be2bfe15d5ccdd3a057acd455ae1430"
    assert LoraAdapter(pairs, base_hash=BASE).content_hash() == expected


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(small().pairs)),
    side=st.sampled_from(["A", "B"]),
    byte=st.integers(0, 79),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_changes_the_hash(name: str, side: str, byte: int, bit: int) -> None:
    adapter = small()
    pairs = {n: LoraPair(pair.A.clone(), pair.B.clone()) for n, pair in adapter.pairs.items()}
    getattr(pairs[name], side).view(torch.uint8).view(-1)[byte] ^= 1 << bit
    assert LoraAdapter(pairs, base_hash=BASE).content_hash() != adapter.content_hash()


def test_names_types_shapes_layout_and_base_are_part_of_the_hash() -> None:
    A, B = torch.zeros(2, 4), torch.zeros(4, 2)
    variants = [
        LoraAdapter({"x": LoraPair(A, B)}, base_hash=BASE),
        LoraAdapter({"y": LoraPair(A, B)}, base_hash=BASE),
        LoraAdapter({"x": LoraPair(A, B)}, base_hash="c" * 64),
        LoraAdapter({"x": LoraPair(A, B)}, base_hash=BASE, fan_in_fan_out=True),
        LoraAdapter({"x": LoraPair(torch.zeros(4, 2), torch.zeros(2, 4))}, base_hash=BASE),
        LoraAdapter({"x": LoraPair(A.half(), B.half())}, base_hash=BASE),
        LoraAdapter({"x": LoraPair(A.bfloat16(), B.bfloat16())}, base_hash=BASE),
    ]
    assert len({adapter.content_hash() for adapter in variants}) == len(variants)


def share(folder: Path, *sides: str) -> None:
    """Move the tensors of these sides, or of none, into the file beside."""
    tensors = load_file(folder / adapters.WEIGHTS_FILE)
    kept = {key: value for key, value in tensors.items() if not key.endswith(sides)}
    save_file(kept, folder / adapters.WEIGHTS_FILE)
    save_file({key: tensors[key] for key in tensors.keys() - kept.keys()}, folder / adapters.SHARED_FILE)


@pytest.mark.parametrize(
    "sides", [("lora_A.weight",), ("lora_B.weight",), ("lora_A.weight", "lora_B.weight")]
)
def test_tensors_in_the_shared_file_count_as_if_they_were_in_the_other(
    tmp_path: Path, sides: tuple[str, ...]
) -> None:
    adapters.write(small(), tmp_path)
    share(tmp_path, *sides)
    read = adapters.read(tmp_path)  # which holds soppu.json against the tensors of both files
    assert read.content_hash() == small().content_hash()
    (tmp_path / adapters.SHARED_FILE).unlink()
    with pytest.raises(AdapterError):
        adapters.read(tmp_path)


def test_a_shared_file_of_other_users_is_not_believed(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    share(tmp_path, "lora_A.weight")
    shared = load_file(tmp_path / adapters.SHARED_FILE)
    save_file({key: value + 1 for key, value in shared.items()}, tmp_path / adapters.SHARED_FILE)
    with pytest.raises(AdapterError, match=r"soppu\.json belongs to other tensors"):
        adapters.read(tmp_path)


def test_a_shared_file_that_is_torn_doubled_or_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    shared = tmp_path / adapters.SHARED_FILE
    for content, message in (
        ((tmp_path / adapters.WEIGHTS_FILE).read_bytes(), r"lora_[AB]\.weight' is in .* and in shared\.saf"),
        (b"", r"shared\.safetensors: truncated or not safetensors"),
        ((tmp_path / adapters.WEIGHTS_FILE).read_bytes()[:400], r"shared\.safetensors: truncated"),
    ):
        shared.write_bytes(content)
        with pytest.raises(AdapterError, match=message):
            adapters.read(tmp_path)
    shared.unlink()
    shared.symlink_to("nothing")
    with pytest.raises(AdapterError, match=r"shared\.safetensors: no such file"):
        adapters.read(tmp_path)
