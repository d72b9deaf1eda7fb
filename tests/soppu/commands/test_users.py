"""`soppu users`, `show` and `forget` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.commands.bases import bases_command
from soppu.commands.users import forget_command, show_command, users_command
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.errors import SoppuError
from soppu.registry import Registry


class Group(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except SoppuError as error:
            raise click.ClickException(str(error)) from error


def soppu(*words: str, answer: str | None = None) -> Result:
    group = Group("soppu", commands=[users_command, show_command, forget_command, bases_command])
    return CliRunner().invoke(group, list(words), input=answer)


def make_adapter(seed: int) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator))
    return LoraAdapter({"model.layers.0.self_attn.q_proj": pair}, base_hash="b" * 64)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Alice has two versions, the older one is served; Bob has one."""
    opened = Registry.open(tmp_path / "registry")
    old = opened.put_adapter(make_adapter(1), user="alice", run="r1", metrics={"loss": 2.56789, "gain": 0.5})
    opened.put_adapter(make_adapter(3), user="bob", run="r1")
    bundle_id = opened.put_bundle(b"1", set_id=opened.freeze_current(Base("", "b" * 64)))
    opened.record_publication(target="embedded", url="http://127.0.0.1:1", bundle_id=bundle_id)
    opened.put_adapter(make_adapter(2), user="alice", run="r2", metrics={"loss": 2.25})
    assert opened.history("alice")[0].adapter_id == old
    return opened


def test_users_prints_a_line_for_each(registry: Registry, tmp_path: Path) -> None:
    result = soppu("users", "--registry", str(tmp_path / "registry"))
    assert result.exit_code == 0
    head, alice, bob = result.output.splitlines()
    assert head.split() == ["USER", "ADAPTER", "SINCE", "(UTC)", "METRICS", "PUBLISHED"]
    old = registry.history("alice")[0].adapter_id
    assert alice.split()[:2] == ["alice", registry.current("alice")]
    assert alice.endswith(f"loss=2.25  embedded http://127.0.0.1:1 ({old})")
    assert bob.split()[:2] == ["bob", registry.current("bob")]
    assert bob.split()[-3:] == ["-", "embedded", "http://127.0.0.1:1"]
    assert head.index("METRICS") == alice.index("loss=")


def test_users_as_json_holds_everything(registry: Registry, tmp_path: Path) -> None:
    result = soppu("users", "--registry", str(tmp_path / "registry"), "--json")
    alice, bob = json.loads(result.output)
    assert alice == {
        "user": "alice",
        "adapter_id": registry.current("alice"),
        "at": registry.users()[0].at,
        "run": "r2",
        "metrics": {"loss": 2.25},
        "versions": 2,
        "published": {"embedded http://127.0.0.1:1": registry.history("alice")[0].adapter_id},
        "basis_id": "",
    }
    assert bob["metrics"] == {}


def test_show_prints_the_history_and_marks_the_current_version(registry: Registry, tmp_path: Path) -> None:
    result = soppu("show", "alice", "--registry", str(tmp_path / "registry"))
    assert result.exit_code == 0
    _, old, new = result.output.splitlines()
    assert old.split()[0] == registry.history("alice")[0].adapter_id
    assert "gain=0.5 loss=2.568" in old
    assert old.endswith("embedded http://127.0.0.1:1")
    assert new.split()[:2] == ["*", registry.current("alice")]
    as_json = soppu("show", "alice", "--registry", str(tmp_path / "registry"), "--json")
    assert [row["run"] for row in json.loads(as_json.output)] == ["r1", "r2"]
    assert [row["current"] for row in json.loads(as_json.output)] == [False, True]


def test_forget_asks_first(registry: Registry, tmp_path: Path) -> None:
    result = soppu("forget", "alice", "--registry", str(tmp_path / "registry"), answer="n\n")
    assert result.exit_code == 1
    assert "2 adapter(s) of 'alice'? [y/N]" in result.output
    assert "alice" in registry.current_set()


@pytest.mark.parametrize(("flags", "answer"), [(("--yes",), None), ((), "y\n")])
def test_forget_says_what_is_still_served(
    registry: Registry, tmp_path: Path, flags: tuple[str, ...], answer: str | None
) -> None:
    root = str(tmp_path / "registry")
    result = soppu("forget", "alice", "--registry", root, *flags, answer=answer)
    assert result.exit_code == 0
    assert "forgot alice: 2 adapter(s) removed" in result.output
    assert "1 bundle(s) hold a core of this user" in result.output
    assert "still served by embedded http://127.0.0.1:1" in result.output
    assert list(registry.current_set()) == ["bob"]
    assert "nothing is kept" in soppu("show", "alice", "--registry", root).output
    assert json.loads(soppu("show", "alice", "--registry", root, "--json").output) == []
    assert "0 adapter(s) removed" in soppu("forget", "alice", "--registry", root, "--yes").output


def test_an_empty_registry_says_so(tmp_path: Path) -> None:
    Registry.open(tmp_path)
    assert soppu("users", "--registry", str(tmp_path)).output == "no users yet\n"
    assert json.loads(soppu("users", "--registry", str(tmp_path), "--json").output) == []


def test_a_catalogue_elsewhere_is_used(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    Registry.open(f"memory://{tmp_path.name}", catalogue=url, cache=tmp_path / "cache").put_adapter(
        make_adapter(1), user="carol"
    )
    result = soppu("users", "--registry", f"memory://{tmp_path.name}", "--catalogue", url)
    assert "carol" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "zed"), "unknown user 'zed'; the registry holds 2 users"),
        (("forget", "zed", "--yes"), "unknown user 'zed'"),
        (("users", "--registry", "nowhere"), "there is no registry"),
        (("users", "--catalogue", "nosuch://x"), "nosuch"),
    ],
)
def test_errors_are_one_line(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".soppu").mkdir()
    (tmp_path / "registry").rename(tmp_path / ".soppu" / "registry")  # the default place
    result = soppu(*words)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def a_basis(seed: int, base: Base) -> CoreBasis:
    draw = torch.Generator().manual_seed(seed)
    sides = torch.randn(4, 2, generator=draw), torch.randn(4, 2, generator=draw)
    return CoreBasis({"model.layers.0.self_attn.q_proj": sides}, base.name, base.hash)


def test_cores_are_shown_with_their_basis_and_bases_with_their_cores(
    registry: Registry, tmp_path: Path
) -> None:
    root = ("--registry", str(tmp_path / "registry"))
    assert soppu("bases", *root).output == "no bases yet\n"
    mine, other = (Base(name, letter * 64) for name, letter in (("tiny", "b"), ("", "c")))
    first, second, elsewhere = a_basis(1, mine), a_basis(2, mine), a_basis(3, other)
    for basis in (first, second, elsewhere):
        registry.put_basis(basis)
    core = registry.put_adapter(cores.zero(second), user="carol")
    registry.put_adapter(cores.zero(second), user="alice")
    gone = registry.put_adapter(cores.zero(first), user="dan")
    for command in (("users",), ("show", "carol")):
        assert f"{core} in {second.id}" in soppu(*command, *root).output
        *_, last = [
            row for row in json.loads(soppu(*command, *root, "--json").output) if row["adapter_id"] == core
        ]
        assert last["basis_id"] == second.id
    assert f"{gone} in {first.id}" in soppu("users", *root).output
    registry.forget("dan")
    assert "*" not in soppu("bases", *root).output
    assert soppu("bases", "--use", first.id, *root).exit_code == 0
    said = soppu("bases", "--use", second.id, *root).output
    lines = {line.replace("*", " ").split()[0]: line for line in said.splitlines()[1:]}
    assert lines[second.id].startswith("*") and "tiny" in lines[second.id] and lines[second.id].endswith(" 1")
    assert lines[first.id].startswith(" ") and lines[first.id].endswith(" 0")
    assert "cccccccccccc" in lines[elsewhere.id]
    rows = json.loads(soppu("bases", *root, "--json").output)
    assert [(row["basis_id"], row["in_force"]) for row in rows if row["in_force"]] == [(second.id, True)]
    refused = soppu("bases", "--use", "u-0", *root)
    assert refused.exit_code == 1 and refused.output == "Error: unknown basis 'u-0'\n"
