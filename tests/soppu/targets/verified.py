"""A server with three users, to be tried by `soppu verify-target`, and the verdicts it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soppu.cli import main
from soppu.compress import Bundle
from soppu.compress.lorax_export import export
from soppu.files import sha256_file
from soppu.targets.lorax_volume import Volume
from soppu.targets.verify import POINTS
from tests.soppu.serve import tiny
from tests.soppu.targets.lorax_double import LoraxDouble

PROMPT = "the quick"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = tiny.llama()
    return tiny.bundle({f"user{n}": tiny.lora(model, seed=n) for n in (1, 2, 3)}, rank=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def file(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "users.soppu")
    return tmp_path / "users.soppu"


@pytest.fixture
def ids(double: LoraxDouble, bundle: Bundle, file: Path) -> dict[str, str]:
    volume = Volume.open(str(double.root))
    return volume.stage(bundle, bundle_id=sha256_file(file), base_model="tiny", layers=2)


@pytest.fixture
def folders(double: LoraxDouble, bundle: Bundle) -> Path:
    """The users' folders below the double's root, without a volume's manifest."""
    export(bundle, double.root / "plain", layers=2, base_model="tiny")
    return double.root / "plain"


def run(url: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify-target", url, "--prompt", PROMPT, *map(str, arguments)])


def verdicts(url: str, *arguments: object) -> tuple[dict[str, str], dict[str, str]]:
    """Point -> verdict, and point -> detail; the exit code goes by the verdicts."""
    result = run(url, "--json", *arguments)
    points = json.loads(result.stdout)["points"]
    assert [point["name"] for point in points] == list(POINTS)
    found = {point["name"]: point["verdict"] for point in points}
    assert result.exit_code == int("fail" in found.values()), result.output
    return found, {point["name"]: point["detail"] for point in points}


def failing(found: dict[str, str]) -> set[str]:
    return {name for name, verdict in found.items() if verdict == "fail"}
