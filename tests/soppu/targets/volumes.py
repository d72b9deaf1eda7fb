"""Two bundles to stage in a LoRAX's volume, and what is found in one afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle
from soppu.targets.lorax_volume import Volume
from tests.soppu.serve import tiny

ONE, TWO = "1" * 64, "2" * 64
LAYERS = 2


def members(*, users: int = 3, rank: int = 3, first: int = 1) -> dict[str, LoraAdapter]:
    model = tiny.llama()
    return {f"user{n}": tiny.lora(model, seed=n, rank=rank) for n in range(first, first + users)}


@pytest.fixture(scope="module")
def shared() -> Bundle:
    return tiny.bundle(members(), rank=8)


@pytest.fixture(scope="module")
def other() -> Bundle:
    """The same first user, and one more, in bases of their own."""
    return tiny.bundle(members(users=2), rank=8)


def stage(volume: Volume, bundle: Bundle, bundle_id: str = ONE, **changes: Any) -> dict[str, str]:
    asked = {"base_model": "org/base", "layers": LAYERS} | changes
    return volume.stage(bundle, bundle_id=bundle_id, **asked)


def open_volume(tmp_path: Path) -> tuple[Volume, Path]:
    folder = tmp_path / "volume"
    folder.mkdir(exist_ok=True)
    return Volume.open(str(folder)), folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What LoRAX makes of a folder: the tensors of all its safetensors files."""
    made: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            assert not stream.metadata()
            assert not made.keys() & set(stream.keys())
            made |= {name: stream.get_tensor(name) for name in stream.keys()}
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_change(folder: Path, bundle: Bundle, user: str, *, close: float = 2e-3) -> None:
    found, own = tensors(folder), bundle.reconstruct(user).pairs
    names = {name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")}
    assert {name.removeprefix("base_model.model.") for name in names} >= set(own)
    for name in names:
        pair = LoraPair(found[f"{name}.lora_A.weight"].float(), found[f"{name}.lora_B.weight"].float())
        wanted = own.get(name.removeprefix("base_model.model."))
        expected = torch.zeros_like(pair.delta()) if wanted is None else wanted.delta()
        assert torch.linalg.norm(pair.delta() - expected) <= close * max(1.0, float(expected.norm()))
