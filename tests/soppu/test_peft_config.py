"""adapter_config.json is read by the rules of PEFT, and each key beyond a plain LoRA is refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from soppu import adapter as adapters
from soppu import peft_config
from soppu.errors import AdapterError
from tests.soppu.small_adapters import edit_config, folder, random_adapter

__all__ = ["folder"]

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
