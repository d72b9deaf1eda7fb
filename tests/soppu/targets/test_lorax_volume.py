"""The volume a LoRAX reads: what lies in it, what is shared, and whom it has a folder for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.lorax_export import Form
from soppu.errors import BundleError, ConfigError, TargetError
from tests.soppu.compress import handmade
from tests.soppu.serve import tiny
from tests.soppu.targets.volumes import (
    ONE,
    TWO,
    assert_same_change,
    content,
    open_volume,
    other,
    shared,
    stage,
    tensors,
)

__all__ = ["other", "shared"]


def used(folder: Path) -> int:
    """Bytes on the disk, every file once."""
    found = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*.safetensors")}
    return sum(found.values())


def test_every_user_has_a_folder_lorax_serves_and_the_basis_lies_once(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    assert volume.source == "local" and volume.staged() == ()
    seen: list[tuple[int, int]] = []
    ids = stage(volume, shared, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert volume.staged() == (ONE,) and volume.placements(ONE) == ids and list(ids) == list(shared.users)
    (basis,) = (folder / "basis").iterdir()
    assert basis.stat().st_nlink == 1 + len(ids)
    for user, path in ids.items():
        assert path.startswith(f"adapters/{user}/") and len(path.rpartition("/")[2]) == 16
        assert sorted(file.name for file in (folder / path).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "shared.safetensors",
        ]
        assert (folder / path / "shared.safetensors").stat().st_ino == basis.stat().st_ino
        config = json.loads((folder / path / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 8 and config["base_model_name_or_path"] == "org/base"
        found = tensors(folder / path)
        assert {one.dtype for one in found.values()} == {torch.float16}
        assert all(one.shape[0 if "lora_A" in name else 1] == 8 for name, one in found.items())
        assert_same_change(folder / path, shared, user)
    assert not list((folder / ".staging").iterdir())


def test_the_larger_factor_is_the_shared_one_so_the_disk_holds_less_than_copies(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.layers.0.mlp.up_proj": (200, 20), "model.layers.0.mlp.down_proj": (20, 200)}

    def drawn(o: int, i: int) -> LoraPair:
        return LoraPair(torch.randn(3, i, generator=generator), torch.randn(o, 3, generator=generator))

    fleet = {f"u{n}": LoraAdapter({name: drawn(*shape) for name, shape in shapes.items()}) for n in range(12)}
    bundle = tiny.bundle(fleet, rank=8)
    volume, folder = open_volume(tmp_path)
    ids = stage(volume, bundle, layers=1)
    (basis,) = (folder / "basis").iterdir()
    assert set(load_file(basis)) == {
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
    }
    copies = sum(
        file.stat().st_size for path in ids.values() for file in (folder / path).glob("*.safetensors")
    )
    assert used(folder) < 0.3 * copies
    for user, path in ids.items():
        assert_same_change(folder / path, bundle, user)


def test_peft_loads_every_folder_and_answers_as_with_the_bundle(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    model, ids = tiny.llama(), torch.arange(2, 14)[None]
    for user, path in stage(volume, shared).items():
        merged = tmp_path / user
        shutil.copytree(folder / path, merged)
        (merged / "shared.safetensors").unlink()
        (merged / "adapter_model.safetensors").unlink()
        save_file(tensors(folder / path), merged / "adapter_model.safetensors")
        with torch.no_grad():
            found = PeftModel.from_pretrained(tiny.llama(), merged)(input_ids=ids).logits
            expected = tiny.merged(model, shared.reconstruct(user))(input_ids=ids).logits
            plain = model(input_ids=ids).logits
        # float16 factors, whose rounding grows over the layers
        assert (found - expected).abs().max() < 0.02 * (expected - plain).abs().max()


@pytest.mark.parametrize("kind", sorted(handmade.PLANS))
def test_bundles_of_every_kind_keep_their_changes(kind: str, tmp_path: Path) -> None:
    bundle = handmade.make(handmade.PLANS[kind])
    volume, folder = open_volume(tmp_path)
    for user, path in stage(volume, bundle, layers=0).items():
        assert_same_change(folder / path, bundle, user, close=1e-2)
    linked = [file for file in (folder / "basis").glob("*")]
    assert bool(linked) == (kind in ("coordinates", "floats", "full cores", "diagonal cores", "two clusters"))


def test_a_basis_wider_than_the_fleets_rank_is_not_shared() -> None:
    narrow, wide = ([[(8, 0, 8, 0)]] * 2 for _ in range(2))
    plans = handmade.Plan(narrow, k=(3, 3)), handmade.Plan(wide, k=(9, 9), shapes={"q": (12, 12)})
    forms = [Form(handmade.make(plan), users=(), dtype="float16", layers=0, base_model="") for plan in plans]
    assert [form.rank for form in forms] == [8, 8]
    assert [bool(form.split("user0")[0]) for form in forms] == [True, False]


def test_staging_again_changes_nothing_and_says_the_same(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    ids, before = stage(volume, shared), content(folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("adapters/*/*/*")}
    assert stage(volume, shared) == ids and content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_folder_that_was_deleted_comes_back(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    ids, before = stage(volume, shared), content(folder)
    shutil.rmtree(folder / ids["user2"])
    assert stage(volume, shared) == ids and content(folder) == before


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "extra.safetensors"])
def test_a_damaged_folder_is_refused_by_name(shared: Bundle, tmp_path: Path, file: str) -> None:
    volume, folder = open_volume(tmp_path)
    path = stage(volume, shared)["user2"]
    place = folder / path / file
    data = place.read_bytes() if place.exists() else b""
    place.unlink(missing_ok=True)
    place.write_bytes(data[:-1] + b"!")
    with pytest.raises(TargetError, match=rf"{path} is damaged.*delete that folder, publish again"):
        stage(volume, shared)
    volume.drop(ONE)
    assert volume.staged() == () and not list(folder.glob("adapters/*")) and not list(folder.glob("basis/*"))


def test_a_folder_damaged_before_its_bundle_was_staged_is_refused_too(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    path = stage(volume, shared)["user2"]
    (folder / f"bundles/{ONE}.json").unlink()
    (folder / path / "shared.safetensors").unlink()
    with pytest.raises(TargetError, match=rf"{path} is damaged"):
        stage(volume, shared)
    assert volume.staged() == ()


def test_dropping_leaves_what_another_bundle_names(shared: Bundle, other: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    one, two = stage(volume, shared, ONE), stage(volume, other, TWO)
    same = stage(volume, shared, "3" * 64)
    assert same == one and volume.staged() == (ONE, TWO, "3" * 64)
    volume.drop(ONE)
    assert all((folder / path).is_dir() for path in one.values())
    volume.drop("3" * 64)
    assert not any((folder / path).exists() for path in one.values())
    assert all((folder / path).is_dir() for path in two.values()) and volume.placements(TWO) == two
    assert len(list((folder / "basis").iterdir())) == 1
    volume.drop("3" * 64)
    with pytest.raises(TargetError, match=r"bundle 111111111111 is not staged here; publish it"):
        volume.placements(ONE)


def test_a_bundle_staged_otherwise_is_refused_until_it_is_dropped(shared: Bundle, tmp_path: Path) -> None:
    volume, _ = open_volume(tmp_path)
    stage(volume, shared)
    for changes in ({"base_model": "org/else"}, {"dtype": "bfloat16"}, {"layers": 3}):
        name = next(iter(changes))
        with pytest.raises(TargetError, match=rf"bundle 111111111111 is staged with {name} .*drop it first"):
            stage(volume, shared, **changes)
    volume.drop(ONE)
    stage(volume, shared, dtype="bfloat16")


def renamed(bundle: Bundle, user: str) -> Bundle:
    report = replace(bundle.report, relative_error={user: 0.0})
    return replace(bundle, users=(user, *bundle.users[1:]), report=report, _last={})


@pytest.mark.parametrize(
    ("user", "folder"),
    [("žofie", "%C5%BEofie"), ("a,b c", "a%2Cb%20c"), ("me@home.org", "me@home.org"), ("%41", "%2541")],
)
def test_ids_hold_nothing_that_ends_a_lorax(shared: Bundle, tmp_path: Path, user: str, folder: str) -> None:
    volume, root = open_volume(tmp_path)
    path = stage(volume, renamed(shared, user))[user]
    assert path.startswith(f"adapters/{folder}/") and (root / path).is_dir()
    assert path.isascii() and path.isprintable() and "," not in path


@pytest.mark.parametrize(
    ("user", "error"), [("a/b", "cannot be the name"), ("..", "cannot be the name"), ("ž" * 50, "too long")]
)
def test_a_user_who_cannot_have_a_folder_is_named(
    shared: Bundle, tmp_path: Path, user: str, error: str
) -> None:
    volume, folder = open_volume(tmp_path)
    with pytest.raises((BundleError, TargetError), match=rf"user '{user[:20]}.*{error}"):
        stage(volume, renamed(shared, user))
    assert not list(folder.iterdir())


def test_ranks_dtypes_and_ids_lorax_cannot_serve_are_refused(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    pair = LoraPair(A=torch.randn(130, 140), B=torch.randn(150, 130))
    options = CompressOptions(method="svd", max_error=1e-3, device="cpu")
    wide = compress({"wide": LoraAdapter({"model.layers.0.up_proj": pair})}, options)
    with pytest.raises(BundleError, match="wide: .*rank 130, LoRAX serves ranks up to 128"):
        stage(volume, wide, layers=1)
    with pytest.raises(ConfigError, match="dtype 'float32', allowed for LoRAX: float16, bfloat16"):
        stage(volume, shared, dtype="float32")
    with pytest.raises(TargetError, match="bundle id '../x': cannot be the name of a file"):
        stage(volume, shared, "../x")
    huge = replace(shared, norm=shared.norm * 1e6, _last={})
    with pytest.raises(BundleError, match=r"user1: .*numbers beyond the range of torch\.float16"):
        stage(volume, huge)
    assert volume.staged() == () and not list(folder.glob("adapters/*"))
