"""A small run of two users, of whom the server would ask something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from soppu import config as configuration
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.federation import emulator
from soppu.federation.attach import initial_pairs
from tests.clients.orders import USERS, Setup


@pytest.fixture
def setup(
    tmp_path: Path,
    tiny_base: Path,
    tiny_llama: PreTrainedModel,
    write_users: Callable[[Path, Mapping[str, int]], Path],
) -> Setup:
    source = write_users(tmp_path / "users", USERS)
    sizes = {"train_examples": 6, "validation_examples": 2, "min_examples": 4, "max_tokens": 96}
    config = configuration.from_dict(
        {
            "base": {"model": str(tiny_base)},
            "data": {"source": str(source), "users": list(USERS), **sizes},
            "lora": {"rank": 2, "alpha": 4},
            "federation": {"local_steps": 2, "personal_steps": 3, "batch_size": 2},
        }
    )
    base = models.resolve(str(tiny_base), cache=tmp_path)
    plan = emulator.make_plan(tiny_llama, base_hash=base.hash, adapter_layers=2, drop_ratio=0.34)
    inner = initial_pairs(emulator.target_shapes(tiny_llama, plan, plan.kept), rank=2, seed=1)
    for pair in inner.values():  # an aligned emulator: not the bare layers
        pair.B.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    shapes = emulator.target_shapes(tiny_llama, plan)
    return Setup(config, plan, shapes, LoraAdapter(inner, base_hash=base.hash))
