"""Rank and scale of a PEFT folder are those that PEFT takes from it, or it is refused with the cure."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu.errors import AdapterError
from soppu.federation.attach import attached
from tests.soppu.small_adapters import edit_config, folder, logits

__all__ = ["folder"]

Q = "model.layers.1.self_attn.q_proj"


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
