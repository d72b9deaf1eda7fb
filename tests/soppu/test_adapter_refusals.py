"""An adapter that is malformed, more than a plain LoRA or of another base model is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu import base_identity
from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.errors import AdapterError
from tests.soppu.small_adapters import BASE, edit_config, edit_tensors, saved_by_peft, small


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
