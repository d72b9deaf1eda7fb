"""`soppu inspect`: what it says of a bundle is what the bundle holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soppu import adapter
from soppu.cli import main
from soppu.compress import Bundle, CompressOptions, compress, forget


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, words)])


@pytest.fixture
def joint(fleet, tmp_path: Path) -> Path:
    """Three users in one basis of rank 3."""
    options = CompressOptions(method="joint", rank=3, device="cpu")
    compress(fleet((2, 2, 1)), options).save(tmp_path / "joint")
    return tmp_path / "joint"


@pytest.fixture
def alone(fleet, tmp_path: Path) -> Path:
    """Three users with nothing shared."""
    options = CompressOptions(method="svd", max_error=0.1, device="cpu")
    compress(fleet((2, 2, 1)), options).save(tmp_path / "alone")
    return tmp_path / "alone"


def test_users_modules_certificate_and_bytes(joint: Path) -> None:
    result = run(joint)
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(joint)
    lines = [line.split() for line in result.stdout.splitlines()]
    for user, adapter_id in zip(bundle.users, bundle.adapter_ids, strict=True):
        assert [user, f"{bundle.report.relative_error[user]:.5f}", "0", adapter_id] in lines
    (row,) = (line for line in lines if line and line[0] == "model.layers.0.q")
    assert row[1:10] == ["20", "x", "16", "3/3", "8/8", "100", "%", "0", "%"]
    assert f"less than {bundle.report.overall.relative_lower_bound:.5f}" in result.stdout
    assert f"{joint.stat().st_size:,} bytes: bases " in result.stdout


def test_own_numbers_are_told_apart_and_claim_no_bound(alone: Path) -> None:
    facts = json.loads(run(alone, "--json").stdout)
    for module in facts["modules"].values():
        counts = module["components"]
        assert counts["own"] > 0 == counts["shared"] == counts["mixed"]
        assert module["k"] == [0, 0]
    assert "none: no module has a shared basis" in run(alone).stdout


def test_json_is_the_bundle_in_numbers(joint: Path) -> None:
    facts = json.loads(run("--json", joint).stdout)
    bundle = Bundle.load(joint, expected_hash=facts["id"])
    assert facts["bytes"] == joint.stat().st_size == sum(facts["parts"].values())
    assert facts["parts"]["pages"] == sum(len(page.data) for page in bundle.pages)
    assert facts["report"] == bundle.report.to_dict()
    assert list(facts["users"]) == list(bundle.users)
    module = facts["modules"]["model.layers.0.q"]
    assert module.pop("components")["shared"] > 0
    assert module == {"out": 20, "in": 16, "k": [3, 3], "widths": [[8, 8]], "ranks": [2, 2, 1]}


def test_one_user(joint: Path) -> None:
    bundle = Bundle.load(joint)
    told = json.loads(run(joint, "--user", "user1", "--json").stdout)
    assert told["error"] == bundle.report.relative_error["user1"]
    assert told["adapter_id"] == bundle.adapter_ids[1]
    module = told["modules"]["model.layers.1.down"]
    assert (
        module["rank"] == 2 and module["error"] == bundle.report.module_error["model.layers.1.down"]["user1"]
    )
    text = run(joint, "--user", "user1").stdout
    assert "model.layers.1.down" in text and "user1, adapter" in text and "user0" not in text


def test_a_user_who_is_not_there_is_named(joint: Path) -> None:
    result = run(joint, "--user", "nobody")
    assert result.exit_code == 1 and "unknown user 'nobody'" in result.output


def test_who_was_taken_out_is_still_listed(joint: Path) -> None:
    bundle = Bundle.load(joint)
    forget(bundle, "user0").save(joint)
    assert f"bases saw    {bundle.adapter_ids[0]} " in run(joint).stdout
    assert json.loads(run(joint, "--json").stdout)["basis_saw"] == [bundle.adapter_ids[0]]


def test_what_is_not_a_bundle_is_refused(fleet, tmp_path: Path) -> None:
    adapter.write(fleet((2,))["user0"], tmp_path / "a")
    result = run(tmp_path / "a" / adapter.WEIGHTS_FILE)
    assert result.exit_code == 1 and "not a SOPPU bundle" in result.output
