"""Whatever is lost, skipped or without effect is said, and is an error where nothing is left."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from soppu import adapter
from soppu.adapter import LoraAdapter, LoraPair
from soppu.cli import main
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.lorax_export import export
from soppu.errors import BundleError
from tests.soppu.compress import stored


def soppu(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def write(fleet: dict[str, LoraAdapter], folder: Path) -> Path:
    for user, made in fleet.items():
        adapter.write(made, folder / user)
    return folder


@pytest.mark.parametrize("method", ["residual", pytest.param("svd", marks=pytest.mark.long)])
def test_a_bundle_with_nothing_of_anybody_is_refused_with_a_size_that_keeps_something(fleet, method):
    adapters = fleet((2, 2, 1))
    with pytest.raises(BundleError) as caught:
        compress(adapters, CompressOptions(method=method, max_bytes=1480))
    match = re.search(
        r"nothing of user0, user1, user2 .* from (\d+) bytes, a ratio of ([0-9.]+)", str(caught.value)
    )
    assert match, caught.value
    for target in ({"max_bytes": int(match[1])}, {"ratio": float(match[2])}):
        report = compress(adapters, CompressOptions(method=method, **target)).report
        assert len(report.lost_users) < 3 and report.parameters_after > 0


def test_the_command_fails_and_writes_nothing_where_nothing_is_left(fleet, tmp_path: Path):
    folder = write(fleet((2, 2, 1)), tmp_path / "users")
    result = soppu("compress", folder, "--out", tmp_path / "b")
    assert result.exit_code == 1 and "bytes" in result.output and "a ratio of" in result.output
    assert not (tmp_path / "b").exists()


def test_a_density_that_keeps_nothing_is_refused(fleet):
    with pytest.raises(BundleError, match="nothing of user0, user1 would .*ternary.*density"):
        compress(fleet((1, 1)), CompressOptions(method="ternary", density=0.001))


def test_who_and_what_is_lost_is_in_the_report_and_in_the_output(fleet, tmp_path: Path):
    made = stored.bundle("ternary")
    assert made.report.lost_users == ("bo", "cy") and made.report.lost_modules == ("layers.0.v",)
    told = made.report.to_dict()
    assert (told["lost_users"], told["lost_modules"]) == (["bo", "cy"], ["layers.0.v"])
    made.save(tmp_path / "b")
    result = soppu("inspect", tmp_path / "b")
    assert "lost users   2 of 3, served as the base model: bo, cy" in result.stdout
    assert "lost modules 1 of 2, nothing kept of anybody: layers.0.v" in result.stdout


def test_a_zero_adapter_is_not_lost(fleet):
    adapters = fleet((2, 2))
    pairs = {name: LoraPair(A=p.A, B=p.B * 0) for name, p in adapters["user1"].pairs.items()}
    adapters["user1"] = replace(adapters["user1"], pairs=pairs)
    assert compress(adapters, CompressOptions(max_error=0.2)).report.lost_users == ()
    zeros = {"user1": adapters["user1"]}
    assert compress(zeros, CompressOptions(max_error=0.2)).report.lost_users == ()


def test_an_export_of_nobody_who_is_left_is_refused_and_of_some_is_said(fleet, tmp_path: Path):
    made = stored.bundle("ternary")
    with pytest.raises(BundleError, match="nothing of bo is in the bundle"):
        export(made, tmp_path / "bo", users=["bo"])
    assert not (tmp_path / "bo").exists()
    made.save(tmp_path / "b")
    result = soppu("export", tmp_path / "b", "--out", tmp_path / "all")
    assert result.exit_code == 0 and "lost users   bo, cy" in result.output


def test_an_export_whose_numbers_all_become_zero_is_refused(fleet, tmp_path: Path):
    adapters = fleet((1,), shapes={"q": (8, 6)})
    pairs = {name: LoraPair(A=p.A * 1e-9, B=p.B * 1e-9) for name, p in adapters["user0"].pairs.items()}
    made = compress({"ann": replace(adapters["user0"], pairs=pairs)}, CompressOptions(max_error=0.1))
    with pytest.raises(BundleError, match="ann: q: numbers too small for torch.float16 .*use float32"):
        export(made, tmp_path / "out")
    assert export(made, tmp_path / "out", dtype="float32").folders.keys() == {"ann"}


def test_folders_that_hold_no_adapter_are_named(fleet, tmp_path: Path):
    folder = write(fleet((2, 2)), tmp_path / "users")
    (folder / "notes").mkdir()
    write(fleet((1,)), folder / "deep" / "er")
    result = soppu("compress", folder, "--max-error", 0.2, "--out", tmp_path / "b")
    assert result.exit_code == 0
    assert f"skipped      {folder / 'deep'}, {folder / 'notes'}: no adapter_config.json" in result.output
    assert Bundle.load(tmp_path / "b").users == ("user0", "user1")


def test_adapters_inside_an_adapter_are_named_as_skipped(fleet, tmp_path: Path):
    folder = write(fleet((2,)), tmp_path / "users") / "user0"
    adapter.write(fleet((1,))["user0"], folder / "checkpoint-100")
    result = soppu("compress", folder, "--max-error", 0.2, "--out", tmp_path / "b")
    assert result.exit_code == 0
    assert f"skipped      {folder / 'checkpoint-100'}: {folder} is an adapter itself" in result.output


def test_two_folders_of_one_name_are_both_named(fleet, tmp_path: Path):
    first, second = (write(fleet((1,)), tmp_path / name) / "user0" for name in ("a", "b"))
    result = soppu("compress", first, second, "--out", tmp_path / "out")
    assert result.exit_code == 2
    said = " ".join(result.output.replace("\u2502", " ").split())
    assert "given twice" in said and "USER=DIR" in said


def test_moments_that_fit_nothing_are_refused(fleet):
    adapters = fleet((2, 2), shapes={"q": (8, 6)})
    with pytest.raises(BundleError, match="moments name 'other' .* such as 'q'"):
        compress(adapters, CompressOptions(max_error=0.2), moments={"other": torch.eye(6)})
    with pytest.raises(BundleError, match="q: moments of 5 features, the adapters have 6"):
        compress(adapters, CompressOptions(max_error=0.2), moments={"q": torch.eye(5)})
    both = {"q": torch.eye(6), "other": torch.eye(9)}
    assert compress(adapters, CompressOptions(max_error=0.2), moments=both).report.whitened
