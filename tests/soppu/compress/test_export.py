"""Folders for LoRAX: the rules of its loader and kernels, and that they still are the users' adapters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from soppu import adapter, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.lorax_export import RANKS, export, spread
from soppu.errors import BundleError, ConfigError, StorageError
from tests.conftest import LAYERS

MODULES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}


def tiny(
    users: int, *, layers: tuple[int, ...], rank: int = 3, base: str = "", seed: int = 0
) -> dict[str, LoraAdapter]:
    """Adapters of the tiny llama's shapes; the last user lacks v_proj, the first has another rank."""
    generator = torch.Generator().manual_seed(seed)

    def pair(o: int, i: int, r: int) -> LoraPair:
        return LoraPair(
            A=0.3 * torch.randn(r, i, generator=generator), B=0.3 * torch.randn(o, r, generator=generator)
        )

    made = {}
    for number in range(users):
        pairs = {
            f"model.layers.{layer}.{kind}": pair(o, i, rank - (number == 0))
            for layer in layers
            for kind, (o, i) in MODULES.items()
            if not (number == users - 1 and kind == "self_attn.v_proj")
        }
        made[f"user{number}"] = LoraAdapter(pairs, base_model=base, base_hash="b" * 64)
    return made


def bundle_of(adapters: dict[str, LoraAdapter], **changes: object) -> Bundle:
    return compress(adapters, CompressOptions(**{"max_error": 0.1, "device": "cpu", **changes}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of(tiny(3, layers=(6, 7), base="org/model"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / adapter.WEIGHTS_FILE, framework="pt") as stream:
        assert not stream.metadata()
        return {name: stream.get_tensor(name) for name in stream.keys()}


def test_every_user_has_every_projection_on_every_layer_at_one_rank(bundle: Bundle, tmp_path: Path) -> None:
    made = export(bundle, tmp_path / "out", dtype="bfloat16")
    assert made.rank == 8 and made.layers == LAYERS and made.modules == LAYERS * len(MODULES)
    names = {f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in MODULES}
    for user in bundle.users:
        found = tensors(made.folders[user])
        assert set(found) == {f"base_model.model.{n}.lora_{side}.weight" for n in names for side in "AB"}
        for name, tensor in found.items():
            assert tensor.dtype == torch.bfloat16
            assert tensor.shape[0 if "lora_A" in name else 1] == 8
            if ".layers.6." not in name and ".layers.7." not in name:
                assert not tensor.any()
    lacking = tensors(made.folders["user2"])
    assert not any(t.any() for name, t in lacking.items() if "v_proj" in name)


def test_the_folder_holds_two_files_and_says_only_what_is_read(bundle: Bundle, tmp_path: Path) -> None:
    made = export(bundle, tmp_path / "out")
    folder = made.folders["user1"]
    assert sorted(path.name for path in folder.iterdir()) == [adapter.CONFIG_FILE, adapter.WEIGHTS_FILE]
    config = json.loads((folder / adapter.CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "org/model"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert not {"rank_pattern", "alpha_pattern", "layers_to_transform", "use_rslora"} & config.keys()
    assert made.bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob(f"*/{adapter.WEIGHTS_FILE}"))


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_read_back_it_is_what_the_bundle_holds(
    bundle: Bundle, tmp_path: Path, dtype: str, close: float
) -> None:
    made = export(bundle, tmp_path / "out", dtype=dtype)
    for user in bundle.users:
        own, back = bundle.reconstruct(user), adapter.read(made.folders[user])
        for name, pair in back.pairs.items():
            delta = LoraPair(pair.A.float(), pair.B.float()).delta()
            expected = own.pairs[name].delta() if name in own.pairs else torch.zeros_like(delta)
            assert torch.linalg.norm(delta - expected) <= close * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("changes", [{}, {"method": "joint", "rank": 6, "max_error": 0.0}])
def test_peft_runs_it_like_the_adapter_it_is(
    tiny_base: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path, changes: dict[str, object]
) -> None:
    base = models.resolve(str(tiny_base), cache=tmp_path)
    bundle = bundle_of(tiny(2, layers=(2, 7), base=str(tiny_base)), **changes)
    made = export(bundle, tmp_path / "out", dtype="float32")
    ids = torch.arange(2, 14)[None]
    plain = models.load_model(base)(input_ids=ids).logits
    for user in bundle.users:
        with torch.no_grad():
            loaded = PeftModel.from_pretrained(models.load_model(base), made.folders[user])
            found = loaded(input_ids=ids).logits
            own = models.load_model(base)
            for name, pair in bundle.reconstruct(user).pairs.items():
                own.get_submodule(name).weight += pair.delta()
            expected = own(input_ids=ids).logits
        assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize(("rank", "written"), [(1, 8), (8, 8), (9, 16), (17, 32)])
def test_the_rank_is_the_next_the_kernels_know(tmp_path: Path, rank: int, written: int) -> None:
    bundle = bundle_of(tiny(2, layers=(0,), rank=rank + 1 if rank == 1 else rank, seed=3), max_error=1e-3)
    users = ("user0",) if rank == 1 else ()
    assert written in RANKS and export(bundle, tmp_path / "out", users=users).rank == written


def test_a_rank_above_128_is_refused_by_name(tmp_path: Path) -> None:
    pair = LoraPair(A=torch.randn(130, 140), B=torch.randn(150, 130))
    small = LoraPair(A=torch.randn(2, 140), B=torch.randn(150, 2))
    name = "model.layers.0.mlp.up_proj"
    bundle = bundle_of(
        {"small": LoraAdapter({name: small}), "large": LoraAdapter({name: pair})},
        method="svd",
        max_error=1e-3,
    )
    with pytest.raises(BundleError, match=rf"large: {name}: rank 130, LoRAX serves ranks up to 128"):
        export(bundle, tmp_path / "out")
    assert export(bundle, tmp_path / "out", users=["small"]).rank == 8


def test_nothing_is_left_of_an_export_that_fails(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = Bundle.reconstruct, []

    def fails(self: Bundle, user: str) -> LoraAdapter:
        if seen:
            raise BundleError("damaged")
        seen.append(user)
        return real(self, user)

    monkeypatch.setattr(Bundle, "reconstruct", fails)
    with pytest.raises(BundleError, match="damaged"):
        export(bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_stays(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="is there already"):
        export(bundle, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_numbers_beyond_float16_are_refused_and_bfloat16_takes_them(tmp_path: Path) -> None:
    large = LoraPair(A=torch.full((1, 4), 1e6), B=torch.full((4, 1), 1e6))
    bundle = bundle_of({"big": LoraAdapter({"model.layers.0.q": large})})
    with pytest.raises(
        BundleError, match=r"big: model\.layers\.0\.q: numbers beyond the range of torch\.float16"
    ):
        export(bundle, tmp_path / "out")
    export(bundle, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("user", ["a/b", "..", "/etc"])
def test_a_name_no_folder_can_have_is_refused(bundle: Bundle, tmp_path: Path, user: str) -> None:
    renamed = dataclasses.replace(bundle, users=(user, *bundle.users[1:]), _last={})
    with pytest.raises(BundleError, match="cannot be the name of a folder"):
        export(renamed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_is_not_one_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int8', allowed: float16, bfloat16, float32"):
        export(bundle, tmp_path / "out", dtype="int8")


def test_modules_without_a_layer_stay_and_layers_beyond_the_model_are_refused() -> None:
    shapes = {"model.layers.1.q": (4, 3), "lm_head": (9, 3)}
    assert list(spread(shapes, layers=2)) == ["model.layers.0.q", "model.layers.1.q", "lm_head"]
    assert list(spread({"head": (2, 2)}, layers=0)) == ["head"]
    with pytest.raises(BundleError, match="layers, 0 to 0"):
        spread(shapes, layers=1)
    with pytest.raises(BundleError, match="one shape a kind"):
        spread({"model.layers.0.q": (4, 3), "model.layers.1.q": (5, 3)}, layers=2)
