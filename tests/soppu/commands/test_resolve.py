"""`soppu resolve`: which id a person's client has to ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soppu.base_identity import Base
from soppu.cli import main
from soppu.registry import Registry
from tests.soppu.commands.test_users import make_adapter


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Alice is served by two servers, bob by none."""
    registry = Registry.open(tmp_path / "registry")
    mine = registry.put_adapter(make_adapter(1), user="alice")
    registry.put_adapter(make_adapter(2), user="bob")
    set_id = registry.freeze_current(Base("nobody's", "0" * 64), chosen={"alice": mine})
    bundle_id = registry.put_bundle(b"1", set_id=set_id)
    registry.record_publication(target="embedded", url="http://e:1", bundle_id=bundle_id)
    placed = {"alice": "adapters/alice/0f3c"}
    registry.record_publication(target="lorax", url="http://l:1", bundle_id=bundle_id, placements=placed)
    return str(tmp_path / "registry")


def resolve(root: str, *words: str) -> Result:
    return CliRunner().invoke(main, ["resolve", *words, "--registry", root])


def test_every_place_is_listed(root: str) -> None:
    result = resolve(root, "alice")
    assert result.exit_code == 0, result.output
    head, embedded, lorax = (line.split() for line in result.output.splitlines())
    assert head == ["TARGET", "URL", "ADAPTER_ID", "BUNDLE"]
    assert embedded[:3] == ["embedded", "http://e:1", "alice"]
    assert lorax[:3] == ["lorax", "http://l:1", "adapters/alice/0f3c"]


def test_one_place_gives_the_id_alone(root: str) -> None:
    assert resolve(root, "alice", "--url", "http://l:1/").output == "adapters/alice/0f3c\n"


def test_json_has_all_of_it(root: str) -> None:
    told = json.loads(resolve(root, "alice", "--json").output)
    assert [row["asked_as"] for row in told] == ["alice", "adapters/alice/0f3c"]
    assert all(row["adapter_id"].startswith("a-") and len(row["bundle_id"]) == 64 for row in told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bob"], "user 'bob' is not served anywhere; served at: nowhere"),
        (["alice", "--url", "http://x:1"], "not served at http://x:1; served at: http://e:1, http://l:1"),
        (["carol"], "unknown user 'carol'"),
        (["no/name"], "user"),
    ],
)
def test_who_is_not_served_is_told_so(root: str, words: list[str], told: str) -> None:
    result = resolve(root, *words)
    assert result.exit_code == 1 and told in result.output and "Traceback" not in result.output


def test_a_forgotten_user_has_no_address(root: str) -> None:
    Registry.open(root).forget("alice")
    assert "'alice' was forgotten" in resolve(root, "alice").output
