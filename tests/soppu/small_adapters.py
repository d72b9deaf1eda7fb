"""Small adapters of random numbers, PEFT folders of such and changes to these, and the logits to compare."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair

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


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / adapters.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / adapters.WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layers' q_proj and v_proj, as SOPPU writes them."""
    adapters.write(small(), tmp_path / "alice")
    (tmp_path / "alice" / adapters.IDENTITY_FILE).unlink()
    return tmp_path / "alice"
