"""PEFT folders whose tensors or files are not what they seem: read as PEFT means them, or refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soppu import adapter as adapters
from soppu.errors import AdapterError
from tests.soppu.small_adapters import edit_config, edit_tensors, folder

__all__ = ["folder"]

Q = "model.layers.1.self_attn.q_proj"


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
