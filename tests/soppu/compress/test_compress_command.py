from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from soppu import adapter, calibrate
from soppu.adapter import LoraAdapter
from soppu.cli import main
from soppu.commands.compress import compress_command
from soppu.compress import Bundle
from soppu.compress.fleet import passes
from soppu.compress.options import ratio
from soppu.config import METHODS

SETTINGS = {
    "residual": ["--max-error", "0.2"],
    "svd": ["--max-error", "0.2"],
    "joint": ["--rank", "4"],
    "joint-diag": ["--rank", "4"],
    "cluster": ["--rank", "2", "--clusters", "2"],
    "ternary": ["--density", "0.5"],
}


@pytest.fixture
def folders(fleet, tmp_path: Path) -> list[str]:
    for user, made in fleet((2, 2, 1)).items():
        adapter.write(made, tmp_path / "users" / user)
    return [str(tmp_path / "users" / f"user{n}") for n in range(3)]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["compress", *map(str, words)])


def test_it_writes_a_bundle_and_prints_errors_and_sizes(folders, tmp_path: Path):
    out = tmp_path / "b.safetensors"
    result = run(*folders, "--max-error", 0.2, "--out", out)
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(out)
    assert bundle.users == ("user0", "user1", "user2")
    report, size = bundle.report, out.stat().st_size
    assert (report.method, report.rank) == ("residual", 64) and report.relative_error_max <= 0.2
    lines = result.stdout.splitlines()
    sizes = [(Path(folder) / adapter.WEIGHTS_FILE).stat().st_size for folder in folders]
    for line, user, before in zip(lines[1:], bundle.users, sizes, strict=False):
        assert line.split() == [user, f"{report.relative_error[user]:.5f}", f"{before:,}"]
    assert f"{sum(sizes):,} -> {size:,} bytes ({sum(sizes) / size:.2f}x)" in result.stdout
    assert f"{ratio(report.parameters_before, size):.2f}x against 16 bits a number" in result.stdout
    errors = (report.relative_error_rms, report.relative_error_mean, report.relative_error_max)
    assert "root mean square {:.5f}, mean {:.5f}, worst {:.5f}".format(*errors) in result.stdout


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_had(folders, tmp_path: Path, method: str):
    out = tmp_path / "b"
    result = run(*folders, "--method", method, *SETTINGS[method], "--out", out)
    assert result.exit_code == 0, result.output
    report = Bundle.load(out).report
    assert report.method == method
    said = {True: "no bases of these ranks less than", False: "none: no module has a shared basis"}
    expected = "no bound is known" if method == "cluster" else said[any(report.k_used.values())]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("certificate"))
    assert expected in line


def test_the_help_names_every_method_and_every_target():
    text = run("--help").output
    assert all(f"\n    {method} " in text for method in METHODS)
    assert all(f"\n    --{name} " in text for name in ("ratio", "max-bytes", "max-error"))


def test_options_reach_the_fit(folders, tmp_path: Path):
    out = tmp_path / "b"
    words = ["--method", "joint", "--rank", 5, "--basis-bits", 32, "--core-bits", 16, "--seed", 7]
    assert run(*folders, *words, "--device", "cpu", "--out", out).exit_code == 0
    report = Bundle.load(out).report
    assert (report.rank, report.seed, report.storage) == (5, 7, "basis float32, cores float16")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratio", 4, "--max-bytes", 9], "ratio and max_bytes are given"),
        (["--clusters", 2], "compress.clusters = 2"),
        (["--method", "joint", "--basis-bits", 7], "compress.basis_bits = 7"),
        (["--max-bytes", 10], "10 bytes"),
        (["--method", "nonsense"], "'nonsense' is not one of"),
    ],
)
def test_what_cannot_be_had_is_said_and_nothing_is_written(folders, tmp_path: Path, words, said):
    result = run(*folders, *words, "--out", tmp_path / "b")
    assert result.exit_code != 0 and said in result.output and "Traceback" not in result.output
    assert not (tmp_path / "b").exists()


def test_a_user_may_be_named(folders, tmp_path: Path):
    out = tmp_path / "b"
    assert run(f"anna={folders[0]}/", f"b={folders[1]}", "--max-error", 0.2, "--out", out).exit_code == 0
    assert Bundle.load(out).users == ("anna", "b")


def test_a_folder_of_adapter_folders_stands_for_all_of_them(folders, tmp_path: Path):
    (tmp_path / "users" / "notes").mkdir()
    (tmp_path / "users" / ".half.tmp").mkdir()
    (tmp_path / "users" / ".half.tmp" / adapter.CONFIG_FILE).write_text("{}")
    assert run(tmp_path / "users", "--max-error", 0.2, "--out", tmp_path / "all").exit_code == 0
    assert run(*folders, "--max-error", 0.2, "--out", tmp_path / "each").exit_code == 0
    assert (tmp_path / "all").read_bytes() == (tmp_path / "each").read_bytes()


@pytest.mark.parametrize("how", ["--method joint --rank 2", "--max-error 0.2"])
def test_an_adapter_is_read_in_every_pass_unless_there_is_room_for_what_it_became(
    folders, tmp_path: Path, monkeypatch, how
):
    seen: list[str] = []
    real = adapter.read
    monkeypatch.setattr(adapter, "read", lambda folder: seen.append(folder.name) or real(folder))
    words = [*how.split(), "--out"]
    assert CliRunner().invoke(compress_command, [*folders, *words, str(tmp_path / "kept")]).exit_code == 0
    once = [seen.count(f"user{n}") for n in range(3)]
    seen.clear()
    monkeypatch.setattr(passes, "ROOM", 0)
    assert CliRunner().invoke(compress_command, [*folders, *words, str(tmp_path / "anew")]).exit_code == 0
    assert once == [2] * 3 and min(seen.count(f"user{n}") for n in range(3)) > 4
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "anew").read_bytes()


def test_a_folder_with_an_equals_sign_in_its_name_is_a_folder(fleet, tmp_path: Path):
    adapter.write(fleet((2,))["user0"], tmp_path / "lr=3")
    assert run(tmp_path / "lr=3", "--max-error", 0.2, "--out", tmp_path / "b").exit_code == 0
    assert Bundle.load(tmp_path / "b").users == ("lr=3",)


@pytest.mark.parametrize("bad", ["user0", "", "a/b", "/a", "a/", "..", "."])
def test_names_that_do_not_work_are_usage_errors(folders, tmp_path: Path, bad):
    given = [folders[0], f"{bad}={folders[1]}"]
    result = run(*given, "--out", tmp_path / "b")
    assert result.exit_code == 2 and "USER=DIR" in result.output
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_that_leaves_no_byte_is_refused(folders, tmp_path: Path, method):
    result = run(*folders, "--method", method, "--ratio", 1e308, "--out", tmp_path / "b")
    assert result.exit_code == 1 and re.search(r"(1e\+308x|of 1 bytes).* \d[\d,]{2,}", result.output)
    assert not (tmp_path / "b").exists()


def test_a_seed_too_large_is_refused_before_anything_is_read(tmp_path: Path):
    result = run(tmp_path / "absent", "--seed", 2**63, "--out", tmp_path / "b")
    assert result.exit_code == 1 and f"compress.seed = {2**63}, allowed: at most {2**63 - 1}" in result.output


def test_a_folder_without_an_adapter_is_an_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", "--out", tmp_path / "b")
    assert result.exit_code == 1 and "adapter_config.json: no such file" in result.output


def moments(made: LoraAdapter, path: Path, *, base_hash: str, base_model: str = "", wider: int = 0) -> Path:
    """A file of second moments in which the first two inputs of a layer matter most."""
    found = {}
    for name, pair in made.pairs.items():
        scale = torch.ones(pair.A.shape[1] + wider)
        scale[:2] = 100.0
        found[name] = torch.diag(scale)
    calibrate.save(found, path, base_hash=base_hash, base_model=base_model, examples=1, tokens=1)
    return path


def test_moments_weigh_the_errors(fleet, folders, tmp_path: Path):
    made = fleet((2, 2, 1))
    path = moments(made["user0"], tmp_path / "m", base_hash="b" * 64)
    words = [*folders, "--method", "joint", "--rank", 2]
    assert run(*words, "--out", tmp_path / "plain").exit_code == 0
    result = run(*words, "--moments", path, "--out", tmp_path / "weighed")
    assert result.exit_code == 0, result.output
    assert "errors weighed by calibration" in result.stdout
    plain, weighed = (Bundle.load(tmp_path / name) for name in ("plain", "weighed"))
    assert weighed.report.whitened and not plain.report.whitened
    lost = []
    for bundle in (plain, weighed):
        squares = 0.0
        for user in bundle.users:
            own, kept = made[user].pairs, bundle.reconstruct(user).pairs
            for name, pair in own.items():
                squares += float((pair.delta() - kept[name].delta())[:, :2].square().sum())
        lost.append(squares)
    assert lost[1] < lost[0]  # what comes in through the inputs that matter is kept better


def test_moments_of_another_base_model_or_width_are_refused(fleet, folders, tmp_path: Path):
    made = fleet((2, 2, 1))["user0"]
    other = moments(made, tmp_path / "other", base_hash="c" * 64)
    result = run(*folders, "--moments", other, "--out", tmp_path / "b")
    assert result.exit_code == 1 and "expected bbbbbbbbbbbb" in result.output
    wide = moments(made, tmp_path / "wide", base_hash="b" * 64, wider=1)
    result = run(*folders, "--moments", wide, "--out", tmp_path / "b")
    assert result.exit_code == 1 and "moments of 17 features, the adapters have 16" in result.output
    assert not (tmp_path / "b").exists()


def test_folders_without_a_hash_take_moments_of_the_base_model_of_their_name(fleet, folders, tmp_path: Path):
    for folder in folders:
        (Path(folder) / adapter.IDENTITY_FILE).unlink()
    made = fleet((2,))["user0"]
    path = moments(made, tmp_path / "m", base_hash="c" * 64, base_model="org/Tiny")
    result = run(*folders, "--max-error", 0.2, "--moments", path, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "do not say which base model" in result.stderr
    assert "known by the name 'tiny' alone; --base MODEL writes its hash" in result.stderr
    assert Bundle.load(tmp_path / "b").report.whitened
    assert json.dumps(Bundle.load(tmp_path / "b").report.to_dict())
    for name in ("org/other", ""):
        path = moments(made, tmp_path / "m", base_hash="c" * 64, base_model=name)
        result = run(*folders, "--moments", path, "--out", tmp_path / "none")
        assert result.exit_code == 1 and "--base MODEL" in result.output
    assert not (tmp_path / "none").exists()
