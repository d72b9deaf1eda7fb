"""PEFT folders that are not what they seem: read as PEFT means them, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu import peft_config
from soppu.errors import AdapterError
from soppu.federation.attach import attached
from tests.soppu.test_adapter import edit_config, edit_tensors, logits, random_adapter, small

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layers' q_proj and v_proj, as SOPPU writes them."""
    adapters.write(small(), tmp_path / "alice")
    (tmp_path / "alice" / adapters.IDENTITY_FILE).unlink()
    return tmp_path / "alice"


# ---- the rank that the configuration says


def merged(model: PreTrainedModel, folder: Path, kind: Any, **options: Any) -> torch.Tensor:
    """Save a weighted merge of two random adapters with PEFT; returns the logits of PEFT's own merge."""
    torch.manual_seed(5)
    settings = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**{**settings, **options}), "one")
    wrapped.add_adapter("two", LoraConfig(**{**settings, **options}))
    wrapped.add_weighted_adapter(
        ["one", "two"], [0.7, 0.4], "both", combination_type=kind, svd_full_matrices=False
    )
    wrapped.set_adapter("both")
    wrapped.eval().save_pretrained(str(folder), selected_adapters=["both"])
    return logits(wrapped)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_a_weighted_merge_of_peft_has_the_scale_it_had_there(
    tiny_llama: PreTrainedModel, tmp_path: Path, kind: str, rslora: bool
) -> None:
    theirs = merged(tiny_llama, tmp_path, kind, use_rslora=rslora)
    with attached(tiny_llama, adapters.read(tmp_path / "both")):
        torch.testing.assert_close(logits(tiny_llama), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {"rank_pattern": {"q_proj": 2}}),  # tensors of the pattern, a configuration without it
        ("svd", {"r": 24}),  # no matrix of (16, 32) has 24 singular vectors
        ("linear", {"rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    ],
    ids=["pattern lost", "rank above the matrix", "pattern lost, rslora"],
)
def test_a_merge_of_another_rank_is_refused_and_its_cure_is_right(
    tiny_llama: PreTrainedModel, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    theirs = merged(tiny_llama, tmp_path, kind, **options)
    folder = tmp_path / "both"
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(copy.deepcopy(tiny_llama), folder)  # PEFT itself does not take it
    cured: dict[str, dict[str, float]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for _ in range(16):  # one module a turn, as a person would
        try:
            adapter = adapters.read(folder)
            break
        except AdapterError as error:
            said = re.findall(r"(\w+_pattern)\['([\w.]+)'\] to ([\d.e+-]+)[, ]", str(error))
            assert len(said) == 2 and re.search(r"tensors have rank \d+, .* says \d+", str(error))
            for name, module, value in said:
                cured[name][module] = int(value) if name == "rank_pattern" else float(value)
            edit_config(folder, **cured)
    with attached(tiny_llama, adapter):
        torch.testing.assert_close(logits(tiny_llama), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{"r": 8}, {"r": 1}, {"rank_pattern": {"q_proj": 3}}])
def test_a_rank_other_than_the_tensors_is_named(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    said = changes.get("r") or 3
    with pytest.raises(
        AdapterError, match=rf"q_proj: the tensors have rank 4, adapter_config.json says {said} "
    ):
        adapters.read(folder)


def test_what_the_file_leaves_out_has_the_default_of_peft(folder: Path) -> None:
    """No lora_alpha is 8 and no r is 8, not whatever the tensors have."""
    before = adapters.read(folder).pairs[Q]
    path = folder / adapters.CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "lora_alpha"}))
    assert torch.equal(adapters.read(folder).pairs[Q].B, before.B * 2)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "r"}))
    with pytest.raises(AdapterError, match="tensors have rank 4, adapter_config.json says 8"):
        adapters.read(folder)


# ---- PEFT's own rules, held against PEFT


NAMES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.experts.3.down_proj",
    "h.2.attn.c_attn",
    "lm_head",
]


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 2, "layers.1.self_attn.q_proj": 3},  # the first that fits, not the closest
        {"proj": 2},  # no part of a name
        {r"model\.layers\.\d+.*": 5, "lm_head": 4},
        {"^model.layers.1.self_attn.q_proj": 7, "layers.1.*": 6},
        {"lm_head|c_attn": 9},
    ],
)
@pytest.mark.parametrize("module", NAMES)
def test_patterns_fit_as_in_peft(patterns: dict[str, int], module: str) -> None:
    fields = peft_config.parse({"rank_pattern": patterns, "alpha_pattern": patterns, "r": 1}, who="x")
    theirs = patterns.get(get_pattern_key(list(patterns), module), 1)
    assert fields.rank(module) == theirs
    assert fields.scale(module) == patterns.get(get_pattern_key(list(patterns), module), 8) / theirs


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.(q|down)_proj"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [11]},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": 2, "layers_pattern": "h"},
        {
            "target_modules": ["q_proj", "c_attn"],
            "layers_to_transform": [1, 2],
            "layers_pattern": ["layers", "h"],
        },
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["experts.3.down_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r"lm_.*"},
    ],
)
@pytest.mark.parametrize("module", NAMES)
def test_modules_are_targeted_as_in_peft(options: dict[str, Any], module: str) -> None:
    theirs = check_target_module_exists(LoraConfig(**options), module)
    excluded = type(theirs).__name__ == "_ExcludedModule"
    assert peft_config.parse(options, who="x").targets(module) == (bool(theirs) and not excluded)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    ],
)
def test_tensors_that_peft_would_drop_are_named(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=r"q_proj: the file has tensors of it, but .* leave it out"):
        adapters.read(folder)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["layers.0.q_proj"], id="a model without a name before its layers"),
        pytest.param(["h.0.attn.c_attn", "h.1.attn.c_attn"], id="GPT-2 without its head"),
        pytest.param(["model.layers.0.q_proj", "lm_head"], id="one module outside the layers"),
        pytest.param(["layers.0.experts.1.up", "layers.0.experts.2.up"], id="experts"),
        pytest.param(["h.0.q", "model.h.1.q"], id="both kinds"),
        pytest.param(["model.h.0.a.q", "model.h.0.b.q", "model.h.1.a.k", "model.h.1.b.k"], id="a name twice"),
    ],
)
def test_peft_and_we_load_every_module_that_we_write(tmp_path: Path, names: list[str]) -> None:
    adapters.write(random_adapter(dict.fromkeys(names, (6, 5))), tmp_path / "a")
    assert adapters.read(tmp_path / "a").pairs.keys() == set(names)
    config = LoraConfig.from_pretrained(str(tmp_path / "a"))
    assert all(check_target_module_exists(config, name) is True for name in names)


# ---- keys of the configuration


def test_every_field_of_the_installed_peft_is_known_or_off_by_default() -> None:
    """A new field with a default of its own has to be looked at: understood, harmless, or refused."""
    defaults = LoraConfig(target_modules=["q_proj"]).to_dict()
    fields = peft_config.parse({**defaults, "peft_type": "LORA", "target_modules": ["q_proj"]}, who="x")
    assert fields.more_than_plain() == []
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    understood = set(peft_config.LoraFields.model_fields)
    assert understood | peft_config.HARMLESS <= names
    for name in understood - {"target_modules", "peft_type", "rank_pattern", "alpha_pattern"}:
        assert getattr(fields, name) == defaults[name]


OTHERS = sorted(
    {field.name for field in dataclasses.fields(LoraConfig)}
    - set(peft_config.LoraFields.model_fields)
    - peft_config.HARMLESS
)


@pytest.mark.parametrize("name", [*OTHERS, "a_key_of_tomorrow"])
@pytest.mark.parametrize("value", [True, 1, "x", ["x"], {"a": 1}])
def test_every_other_key_that_is_set_is_refused_by_name(folder: Path, name: str, value: Any) -> None:
    edit_config(folder, **{name: value})
    with pytest.raises(AdapterError, match=re.escape(f"not a plain LoRA adapter: {name}={value!r}")):
        adapters.read(folder)


@pytest.mark.parametrize("value", [None, False, [], {}, "", "none"])
def test_a_key_of_a_newer_peft_that_is_off_is_no_matter(folder: Path, value: Any) -> None:
    edit_config(folder, a_key_of_tomorrow=value)
    assert adapters.read(folder).pairs


@pytest.mark.parametrize(
    "kind", ["pissa_niter_16", "corda", "loftq", "olora", "mica", "lora_ga", "of_tomorrow", 1]
)
def test_an_initialisation_that_changes_the_base_is_refused(folder: Path, kind: Any) -> None:
    edit_config(folder, init_lora_weights=kind)
    with pytest.raises(AdapterError, match=f"init_lora_weights={kind!r}.*path_initial_model"):
        adapters.read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "4"},
        {"r": 4.5},
        {"lora_alpha": float("nan")},
        {"lora_alpha": True},
        {"rank_pattern": {"q_proj": -1}},
        {"use_rslora": "false"},
        {"fan_in_fan_out": 1},
        {"target_modules": "("},
        {"target_modules": 3},
        {"base_model_name_or_path": ["x"]},
    ],
)
def test_a_value_of_the_wrong_type_is_named(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {next(iter(changes))} .*: "):
        adapters.read(folder)


# ---- types of numbers


@pytest.mark.parametrize("alpha", [4, 6])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float64"])
def test_every_float_that_a_file_can_hold_is_read_exactly(folder: Path, name: str, alpha: int) -> None:
    kind = getattr(torch, name)
    edit_config(folder, lora_alpha=alpha)
    edit_tensors(folder, lambda tensors: tensors.update({n: t.to(kind) for n, t in tensors.items()}))
    stored = load_file(folder / adapters.WEIGHTS_FILE)
    for module, pair in adapters.read(folder).pairs.items():
        for side, factor in (("A", 1), ("B", alpha / 4)):
            expected = stored[f"base_model.model.{module}.lora_{side}.weight"].double() * factor
            assert torch.equal(getattr(pair, side).double(), expected)
        assert pair.delta().isfinite().all()


def test_halves_of_two_types_are_brought_to_one(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if "lora_A" in n})
    )
    for pair in adapters.read(folder).pairs.values():
        assert pair.A.dtype == pair.B.dtype == torch.float32
        assert pair.delta().shape == (6, 5)


@pytest.mark.parametrize("name", ["int8", "int64", "bool", "complex64", "uint8"])
def test_numbers_that_are_no_floats_are_refused_by_name(folder: Path, name: str) -> None:
    edit_tensors(
        folder, lambda tensors: tensors.update({n: t.to(getattr(torch, name)) for n, t in tensors.items()})
    )
    with pytest.raises(AdapterError, match=rf"lora_[AB] holds {name}, expected float16"):
        adapters.read(folder)


def test_eight_bits_that_are_not_finite_are_found(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: tensors.update({n: (t * 1e9).to(torch.float8_e5m2) for n, t in tensors.items()}),
    )
    with pytest.raises(AdapterError, match="holds NaN or Inf"):
        adapters.read(folder)


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{Q}.lora_magnitude_vector.weight",
        f"base_model.model.{Q}.lora_B.bias",
        f"base_model.model.{Q}.base_layer.weight",
        "base_model.model.lm_head.weight",
        f"{Q}.lora_A.weight",
        f"base_model.model.{Q}.lora_A.weight_scale",
    ],
)
def test_a_tensor_that_nobody_asked_for_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 5)}))
    with pytest.raises(AdapterError, match=re.escape(f"tensor {name!r} is not a lora_A or lora_B weight")):
        adapters.read(folder)


# ---- files that are not there, and what lies beside


def test_weights_in_a_bin_file_come_with_a_line_that_converts_them(folder: Path) -> None:
    before = adapters.read(folder).content_hash()
    weights = folder / adapters.WEIGHTS_FILE
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    follow(folder, "the weights are in adapter_model.bin")
    assert adapters.read(folder).content_hash() == before


def test_weights_in_parts_come_with_a_line_that_joins_them(folder: Path) -> None:
    before = adapters.read(folder).content_hash()
    weights = folder / adapters.WEIGHTS_FILE
    tensors = load_file(weights)
    for number, names in enumerate((sorted(tensors)[:3], sorted(tensors)[3:]), start=1):
        save_file(
            {name: tensors[name] for name in names},
            folder / f"adapter_model-0000{number}-of-00002.safetensors",
        )
    weights.unlink()
    follow(folder, "the weights are in parts")
    assert adapters.read(folder).content_hash() == before


def follow(folder: Path, said: str) -> None:
    """Do what the refusal says."""
    with pytest.raises(AdapterError, match=said) as caught:
        adapters.read(folder)
    line = re.search(r'in (\S+) run: python -c "(.+)"', str(caught.value))
    assert line is not None and line[1] == str(folder)
    subprocess.run([sys.executable, "-c", line[2]], cwd=line[1], check=True)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("checkpoint-500/adapter_config.json", "there is an adapter in .*checkpoint-500: give that folder"),
        ("adapter/adapter_config.json", "there is an adapter in .*/adapter: give that folder"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors is of a whole model"),
        ("pytorch_model.bin", "pytorch_model.bin is of a whole model"),
        ("adapter_model.safetensors", "weights are there, but only that file says their scale"),
        (
            "notes.txt",
            "the folder holds notes.txt; needed are adapter_config.json and adapter_model.safetensors",
        ),
    ],
)
def test_what_lies_beside_an_absent_configuration_is_named(tmp_path: Path, beside: str, said: str) -> None:
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_text("x")
    with pytest.raises(AdapterError, match=f"no such file; .*{said}"):
        adapters.read(tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="file is a file; give the folder"):
        adapters.read(tmp_path / "file")
    with pytest.raises(AdapterError, match="absent does not exist; give the folder"):
        adapters.read(tmp_path / "absent")


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b"[" * 100_000, b'{"r": 4'])
def test_bytes_that_are_no_json_are_refused(folder: Path, data: bytes) -> None:
    (folder / adapters.CONFIG_FILE).write_bytes(data)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: not JSON"):
        adapters.read(folder)


def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    for name in (adapters.WEIGHTS_FILE, adapters.CONFIG_FILE):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(AdapterError, match=rf"{name}: (truncated|cannot be read)"):
            adapters.read(folder)
