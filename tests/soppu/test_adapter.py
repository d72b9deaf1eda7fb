"""LoraAdapter: PEFT reads what we write, we read what PEFT writes, and nothing malformed gets through."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu import base_identity
from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.errors import AdapterError
from soppu.federation import emulator
from soppu.federation.attach import attached

BASE = "b" * 64
IDS = torch.tensor([[5, 17, 200, 9, 33, 34, 35]])


def random_adapter(shapes: dict[str, tuple[int, int]], *, rank: int = 4, seed: int = 0) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(
            torch.randn(rank, i, generator=generator) * 0.3, torch.randn(o, rank, generator=generator) * 0.3
        )
        for name, (o, i) in shapes.items()
    }
    return LoraAdapter(pairs, base_model="tiny", base_hash=BASE)


def small() -> LoraAdapter:
    return random_adapter(
        {f"model.layers.{n}.self_attn.{p}": (6, 5) for n in (0, 1) for p in ("q_proj", "v_proj")}
    )


def shapes_of(model: PreTrainedModel, *, targets: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    plan = emulator.make_plan(model, base_hash=BASE, adapter_layers=2, drop_ratio=0.2, target_modules=targets)
    return emulator.target_shapes(model, plan)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved_by_peft(model: PreTrainedModel, folder: Path, **options: Any) -> torch.Tensor:
    """Wrap a copy with PEFT, make its LoRA random, save it; returns PEFT's own logits."""
    torch.manual_seed(3)
    settings = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    }
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**{**settings, **options})).eval()
    wrapped.save_pretrained(folder)
    return logits(wrapped)


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


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_is_more_than_a_plain_lora_is_refused(
    tiny_llama: PreTrainedModel, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    saved_by_peft(tiny_llama, tmp_path, **options)
    with pytest.raises(AdapterError, match="not a plain LoRA adapter") as caught:
        adapters.read(tmp_path)
    assert reason in str(caught.value) and str(tmp_path) in str(caught.value)


def test_trained_embeddings_are_refused(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(AdapterError, match="embed_tokens.*not a lora_A or lora_B weight"):
        adapters.read(tmp_path)


def test_another_peft_method_is_refused(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    edit_config(tmp_path, peft_type="IA3")
    with pytest.raises(AdapterError, match="peft_type 'IA3'"):
        adapters.read(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / adapters.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / adapters.WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(KEY.format("B")))
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.q_proj: lora_B is missing"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(tmp_path: Path, value: float) -> None:
    adapters.write(small(), tmp_path)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format("A")][3, 2] = value

    edit_tensors(tmp_path, poison)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj: lora_A holds NaN or Inf"):
        adapters.read(tmp_path)


def test_halves_of_different_rank_are_refused(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({KEY.format("A"): torch.zeros(3, 5)}))
    with pytest.raises(AdapterError, match=r"A \(3, 5\) and B \(6, 4\) do not share a rank"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_safetensors_is_an_adapter_error(tmp_path: Path, keep: int) -> None:
    adapters.write(small(), tmp_path)
    path = tmp_path / adapters.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: truncated or not safetensors"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("name", [adapters.CONFIG_FILE, adapters.WEIGHTS_FILE])
def test_an_absent_file_is_named(tmp_path: Path, name: str) -> None:
    adapters.write(small(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(AdapterError, match=f"{name}: no such file"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[]", "3"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    adapters.write(small(), tmp_path)
    (tmp_path / adapters.CONFIG_FILE).write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: (not JSON|holds a)"):
        adapters.read(tmp_path)


def test_no_tensors_at_all_is_refused(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.clear())
    with pytest.raises(AdapterError, match="holds no LoRA tensors"):
        adapters.read(tmp_path)


def test_another_base_model_is_refused_by_name() -> None:
    base_identity.check(small().base, Base("", BASE), who="alice", whose="this is")
    with pytest.raises(
        AdapterError, match=r"alice: made for base model bbbbbbbbbbbb .*, this is cccccccccccc"
    ):
        base_identity.check(small().base, Base("", "c" * 64), who="alice", whose="this is")
    foreign = LoraAdapter(small().pairs, base_model="some/hub-model")
    with pytest.raises(AdapterError, match=r"unknown \(some/hub-model\)"):
        base_identity.check(foreign.base, Base("", BASE), who="alice", whose="this is")


def test_a_stamp_gives_name_and_hash_and_never_contradicts_a_hash() -> None:
    plain = LoraAdapter(small().pairs, base_model="C:\\elsewhere")
    made = adapters.stamped(plain, Base("org/Name", BASE), who="alice")
    assert made.base == Base("org/Name", BASE) and made.content_hash() != plain.content_hash()
    assert adapters.stamped(small(), Base("org/Name", BASE), who="alice").base == Base("org/Name", BASE)
    with pytest.raises(
        AdapterError, match=r"alice: made for base model bbbbbbbbbbbb .*--base is cccccccccccc"
    ):
        adapters.stamped(small(), Base("org/Name", "c" * 64), who="alice")


def test_check_shapes_names_the_first_module_that_differs() -> None:
    expected = {name: (6, 5) for name in small().pairs}
    adapters.check_shapes(small(), expected, who="alice")
    with pytest.raises(
        AdapterError, match=r"alice: .*layers\.1.*shape \(6, 5\), the base model has \(5, 6\)"
    ):
        adapters.check_shapes(small(), {**expected, "model.layers.1.self_attn.v_proj": (5, 6)}, who="alice")
    expected.pop("model.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: the base model has no such"):
        adapters.check_shapes(small(), expected, who="alice")


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


def test_an_identity_left_over_from_other_tensors_is_not_believed(tmp_path: Path) -> None:
    adapters.write(small(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: next(iter(tensors.values())).add_(1.0))
    with pytest.raises(AdapterError, match=r"soppu\.json belongs to other tensors"):
        adapters.read(tmp_path)
    (tmp_path / "soppu.json").unlink()
    assert adapters.read(tmp_path).base_hash == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": None},
        {"lora_alpha": "x"},
        {"alpha_pattern": {"(": 4}},
        {"alpha_pattern": ["q_proj"]},
    ],
)
def test_a_scale_that_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapters.write(small(), tmp_path)
    edit_config(tmp_path, **changes)
    (name,) = changes
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {name} .*mend the value"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("shape", [(0, 4), (), (4,)])
def test_factors_that_are_no_matrix_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    adapters.write(small(), tmp_path)

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if "lora_A" in key)
        tensors[name] = torch.zeros(shape)

    edit_tensors(tmp_path, flatten)
    with pytest.raises(AdapterError, match="lora_A has shape"):
        adapters.read(tmp_path)
