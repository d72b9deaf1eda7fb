"""`soppu project`, `soppu remove`, `soppu export` as a person types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from soppu import adapter
from soppu.cli import main
from soppu.compress import Bundle, CompressOptions, compress


def soppu(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture
def bundle(folders: list[str], tmp_path: Path) -> Path:
    """user0, user1 and user2 in one basis of rank 8."""
    adapters = {Path(folder).name: adapter.read(Path(folder)) for folder in folders[:3]}
    options = CompressOptions(method="joint", rank=8, basis_bits=16, core_bits=16, device="cpu")
    compress(adapters, options).save(tmp_path / "old")
    return tmp_path / "old"


def test_new_users_join_and_nobody_else_changes(bundle: Path, folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = soppu("project", bundle, f"anna={folders[3]}", folders[4], "--out", out, "--max-error", 0.3)
    assert result.exit_code == 0, result.output
    before, after = Bundle.load(bundle), Bundle.load(out)
    assert after.users == (*before.users, "anna", "user4")
    lines = [line.split() for line in result.stdout.splitlines()]
    for user in ("anna", "user4"):
        error = after.report.relative_error[user]
        (line,) = (line for line in lines if line and line[0] == user)
        assert line[1] in ("basis", "residual") and line[2] == f"{error:.5f}" and error <= 0.3
    for user in before.users:
        for name, pair in before.reconstruct(user).pairs.items():
            assert torch.equal(after.reconstruct(user).pairs[name].delta(), pair.delta())


def test_who_does_not_fit_is_queued_and_the_others_are_written(
    bundle: Path, folders: list[str], tmp_path: Path
) -> None:
    made = adapter.read(Path(folders[4]))
    known = Bundle.load(bundle).reconstruct("user0")
    adapter.write(known, tmp_path / "twin")  # lies in the bases exactly
    words = [f"twin={tmp_path / 'twin'}", f"other={folders[4]}", "--max-error", 0.05, "--max-bytes", 150]
    result = soppu("project", bundle, *words, "--out", tmp_path / "new")
    assert result.exit_code == 3, result.output
    assert "queued       other" in result.stderr and made.parameters() > 0
    assert Bundle.load(tmp_path / "new").users == ("user0", "user1", "user2", "twin")


def test_a_user_of_the_bundle_cannot_be_added_again(bundle: Path, folders: list[str], tmp_path: Path) -> None:
    result = soppu("project", bundle, folders[0], "--out", tmp_path / "new", "--max-error", 0.3)
    assert result.exit_code == 1 and "'user0' is in the bundle already" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [[], ["--max-error", "0"], ["--max-error", "1"]])
def test_an_error_must_be_allowed(bundle: Path, folders: list[str], tmp_path: Path, words: list[str]) -> None:
    assert soppu("project", bundle, folders[3], *words, "--out", tmp_path / "new").exit_code == 2


def test_removing_says_what_the_bases_have_seen(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = soppu("remove", bundle, "user0", "user2", "user0", "--out", out)
    assert result.exit_code == 0, result.output
    before, after = Bundle.load(bundle), Bundle.load(out)
    assert after.users == ("user1",)
    assert after.basis_saw == (before.adapter_ids[0], before.adapter_ids[2])
    assert "bases saw    2 adapter(s)" in result.stdout and "1 users" in result.stdout


def test_where_nothing_is_shared_nothing_stays(folders: list[str], tmp_path: Path) -> None:
    adapters = {Path(folder).name: adapter.read(Path(folder)) for folder in folders[:3]}
    compress(adapters, CompressOptions(method="svd", max_error=0.2, device="cpu")).save(tmp_path / "old")
    result = soppu("remove", tmp_path / "old", "user1", "--out", tmp_path / "new")
    assert result.exit_code == 0 and "bases saw" not in result.stdout


@pytest.mark.parametrize("users", [["nobody"], ["user0", "user1", "user2"]])
def test_nobody_and_everybody_cannot_be_removed(bundle: Path, tmp_path: Path, users: list[str]) -> None:
    result = soppu("remove", bundle, *users, "--out", tmp_path / "new")
    assert result.exit_code == 1 and "user" in result.output
    assert not (tmp_path / "new").exists()


def test_export_writes_a_folder_a_user(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--user", "user1", "--user", "user0", "--dtype", "float32", "--layers", 3]
    result = soppu("export", bundle, "--out", out, *words, "--base-model", "org/served")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["user0", "user1"]
    config = json.loads((out / "user0" / adapter.CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, "org/served")
    assert "rank         8, 6 modules over 3 layers, float32" in result.stdout
    size = sum(path.stat().st_size for path in out.glob(f"*/{adapter.WEIGHTS_FILE}"))
    assert f"on disk      {size:,} bytes" in result.stdout


def test_layers_come_from_the_base_models_folder(folders: list[str], tiny_base: Path, tmp_path: Path) -> None:
    import dataclasses

    made = dataclasses.replace(adapter.read(Path(folders[0])), base_model=str(tiny_base))
    compress({"ann": made}, CompressOptions(max_error=0.2, device="cpu")).save(tmp_path / "old")
    result = soppu("export", tmp_path / "old", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "over 8 layers" in result.stdout


def test_an_export_never_lands_on_what_is_there(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert soppu("export", bundle, "--out", out).exit_code == 0
    before = sorted(out.rglob("*"))
    result = soppu("export", bundle, "--out", out)
    assert result.exit_code == 1 and "is there already" in result.output
    assert sorted(out.rglob("*")) == before
    shutil.rmtree(out)
    assert soppu("export", bundle, "--out", out, "--user", "nobody").exit_code == 1
    assert not list(tmp_path.glob(".out*")) and not out.exists()
