from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from soppu import adapter
from soppu.commands.compress import compress_command, inspect_command
from soppu.compress import Bundle
from soppu.errors import AdapterError, BundleError


@pytest.fixture
def folders(fleet, tmp_path: Path) -> list[str]:
    for user, made in fleet((2, 2, 1)).items():
        adapter.write(made, tmp_path / user)
    return [str(tmp_path / f"user{n}") for n in range(3)]


def test_compress_writes_a_bundle_and_prints_errors_and_sizes(folders, tmp_path: Path):
    out = tmp_path / "b.safetensors"
    result = CliRunner().invoke(compress_command, [*folders, "--rank", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(out)
    assert bundle.users == ("user0", "user1", "user2") and bundle.report.k == 3
    lines = result.stdout.splitlines()
    for line, user in zip(lines[1:], bundle.users, strict=False):
        size = (tmp_path / user / adapter.WEIGHTS_FILE).stat().st_size
        assert line.split() == [user, f"{bundle.report.relative_error[user]:.5f}", f"{size:,}"]
    assert f"-> {out.stat().st_size:,} bytes" in result.stdout
    assert f"{bundle.report.parameters_before:,} -> {bundle.report.parameters_after:,}" in result.stdout


def test_a_user_may_be_named_and_the_storage_type_chosen(folders, tmp_path: Path):
    out = tmp_path / "b"
    arguments = [f"anna={folders[0]}/", f"b={folders[1]}", "--dtype", "float32", "--out", str(out)]
    assert CliRunner().invoke(compress_command, arguments).exit_code == 0
    bundle = Bundle.load(out)
    assert bundle.users == ("anna", "b") and bundle.report.dtype == "float32"


def test_a_folder_with_an_equals_sign_in_its_name_is_a_folder(fleet, tmp_path: Path):
    adapter.write(fleet((2,))["user0"], tmp_path / "lr=3")
    out = tmp_path / "b"
    assert CliRunner().invoke(compress_command, [str(tmp_path / "lr=3"), "--out", str(out)]).exit_code == 0
    assert Bundle.load(out).users == ("lr=3",)


@pytest.mark.parametrize("bad", ["twice", "nameless"])
def test_names_that_do_not_work_are_usage_errors(folders, tmp_path: Path, bad):
    given = {"twice": [folders[0], f"user0={folders[1]}"], "nameless": [f"={folders[0]}"]}[bad]
    result = CliRunner().invoke(compress_command, [*given, "--out", str(tmp_path / "b")])
    assert result.exit_code == 2 and "USER=DIR" in result.output
    assert not (tmp_path / "b").exists()


def test_a_folder_without_an_adapter_is_an_adapter_error(tmp_path: Path):
    result = CliRunner().invoke(compress_command, [str(tmp_path), "--out", str(tmp_path / "b")])
    assert isinstance(result.exception, AdapterError)


def test_inspect_prints_users_modules_and_certificate(folders, tmp_path: Path):
    out = tmp_path / "b"
    CliRunner().invoke(compress_command, [*folders, "--rank", "5", "--out", str(out)])
    result = CliRunner().invoke(inspect_command, [str(out)])
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(out)
    for user, adapter_id in zip(bundle.users, bundle.adapter_ids, strict=True):
        assert any(line.split()[::2] == [user, adapter_id] for line in result.stdout.splitlines())
    assert "model.layers.0.q" in result.stdout and "20 x 16" in result.stdout and "thin, 2" in result.stdout
    assert f"{bundle.report.overall.relative_lower_bound:.5f}" in result.stdout


def test_inspect_as_json_is_the_report(folders, tmp_path: Path):
    out = tmp_path / "b"
    CliRunner().invoke(compress_command, [*folders, "--rank", "3", "--out", str(out)])
    facts = json.loads(CliRunner().invoke(inspect_command, ["--json", str(out)]).stdout)
    bundle = Bundle.load(out, expected_hash=facts["id"])
    assert facts["bytes"] == out.stat().st_size
    assert facts["report"] == bundle.report.to_dict()
    assert list(facts["users"]) == list(bundle.users)
    assert facts["modules"]["model.layers.0.q"] == {
        "out": 20,
        "in": 16,
        "k": 3,
        "c": None,
        "ranks": [2, 2, 1],
    }


def test_inspect_refuses_what_is_not_a_bundle(folders):
    result = CliRunner().invoke(inspect_command, [f"{folders[0]}/{adapter.WEIGHTS_FILE}"])
    assert isinstance(result.exception, BundleError)
