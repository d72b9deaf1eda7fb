"""docs/federation.md and the files it puts to use: commands, options, variables and units are real."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from compose_spec import PyCompose

from soppu import config as configuration
from soppu.cli import main

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "deploy" / "federation"
PAGE = (ROOT / "docs" / "federation.md").read_text()
SYSTEM = {
    "useradd",
    "install",
    "sudo",
    "cp",
    "chmod",
    "cd",
    "export",
    "set",
    "systemctl",
    "docker",
    "ssh-keygen",
    "git",
    "make",
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [
        text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M) if name == language
    ]


def commands() -> list[list[str]]:
    """Every command line of the blocks without a language, without what gives it another user."""
    found = [shlex.split(line) for block in blocks("") for line in block.splitlines()]
    for words in found:
        while words[0] == "sudo" or words[0].startswith("-") or words[0] in ("soppu", "soppu-alice"):
            del words[0]
    return found


COMMANDS = commands()


def test_the_page_has_commands_and_every_program_is_known() -> None:
    assert len(COMMANDS) > 20
    for words in COMMANDS:
        ours = words[0].startswith((".venv/bin/", "deploy/federation/"))
        assert ours or words[0] in SYSTEM, words


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == ".venv/bin/soppu"], ids=" ".join)
def test_commands_of_soppu_are_taken_as_they_stand(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but their doing: arguments are parsed by the command itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("alice.pub", "bob.pub"):
        (tmp_path / name).touch()
    command: click.Command = main
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, rest[0]
        command, rest = found, rest[1:]
    command.make_context(command.name, rest)


@pytest.mark.parametrize(
    "words", [c for c in COMMANDS if c[0].startswith("deploy/federation/")], ids=" ".join
)
def test_scripts_are_there_and_know_what_they_are_told(words: list[str]) -> None:
    script = ROOT / words[0]
    assert os.access(script, os.X_OK)
    if words[0].endswith("supernode.sh"):
        assert f"    {words[1]}) " in script.read_text()


def test_files_that_the_page_copies_or_names_are_there() -> None:
    for name in re.findall(r"(?:deploy|server|configs)/[\w./@-]+\w", PAGE):
        assert (ROOT / name).exists(), name
    for words in (c for c in COMMANDS if c[0] == "make"):
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_every_variable_of_the_page_is_one_that_a_script_reads() -> None:
    known = (FILES / "superlink.sh").read_text() + (FILES / "supernode.sh").read_text() + "FLWR_HOME"
    given = [line.partition("=")[0] for block in blocks("ini") for line in block.splitlines()]
    assert {"CERTIFICATES", "NODE", "DATA"} <= set(given)
    for name in (*given, *re.findall(r"`([A-Z][A-Z_]{3,})`", PAGE)):
        assert name in known or name in (FILES / "compose.yaml").read_text(), name


def test_configurations_of_the_page_are_read_as_they_stand() -> None:
    connection, run, cores = (tomllib.loads(block) for block in blocks("toml"))
    assert set(connection["superlink"]["team"]) == {"address", "root-certificates"}
    config = configuration.from_dict(run)
    assert config.federation.connection == "team" and config.federation.members
    assert configuration.from_dict(cores).federation.form == "auto"


@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode"])
def test_flower_knows_every_option_of_the_scripts(program: str) -> None:
    script = {"flower-superlink": "superlink.sh", "flower-supernode": "supernode.sh"}[program]
    text = (
        (FILES / script)
        .read_text()
        .split(program if program == "flower-supernode" else "server.superlink")[-1]
    )
    options = set(re.findall(r"(?<=\s)--[a-z-]+", text.split("sign_off()")[0]))
    known = subprocess.run(
        [str(Path(sys.executable).parent / program), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert len(options) >= 6
    assert {option for option in options if option not in known} == set()


def test_the_sign_off_is_given_the_options_it_has() -> None:
    from clients.sign_off import main as sign_off

    text = (FILES / "supernode.sh").read_text().split("clients.sign_off")[1].split("2>")[0]
    given = set(re.findall(r"(?<=\s)--[a-z-]+", text))
    assert given == {option for item in sign_off.params for option in item.opts}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in ("soppu-superlink.service", "soppu-supernode@.service"):
        text = (FILES / unit).read_text().replace("/opt/soppu", str(ROOT))
        (tmp_path / unit.replace("@", "@alice")).write_text(text)
    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "soppu" in line]
    newer = ("RestartSteps", "RestartMaxDelaySec")  # of systemd 254; an older one leaves them out
    assert [line for line in said if not any(name in line for name in newer)] == []


@pytest.mark.parametrize("script", sorted(path.name for path in FILES.glob("*.sh")))
def test_scripts_say_what_they_need(script: str, tmp_path: Path) -> None:
    assert subprocess.run(["sh", "-n", str(FILES / script)], check=False).returncode == 0
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [str(FILES / script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 or "CERTIFICATES" in done.stderr or "SUPERLINK" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl")
def test_certificates_name_every_address_and_are_made_once(tmp_path: Path) -> None:
    command = [
        str(FILES / "certificates.sh"),
        str(tmp_path / "c"),
        "hub.example",
        "192.0.2.10",
        "2001:db8::1",
    ]
    subprocess.run(command, capture_output=True, check=True)
    show = ["openssl", "x509", "-in", str(tmp_path / "c" / "server.crt"), "-noout", "-ext", "subjectAltName"]
    names = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    for name in ("DNS:localhost", "127.0.0.1", "DNS:hub.example", "192.0.2.10", "2001:DB8:0:0:0:0:0:1"):
        assert name in names
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert {"ca.crt", "ca.key", "server.crt", "server.key"} <= before.keys()
    assert {path.name: path.stat().st_mode & 0o077 for path in (tmp_path / "c").glob("*.key")} == {
        "ca.key": 0,
        "server.key": 0,
    }
    subprocess.run(command, capture_output=True, check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


@pytest.mark.parametrize("profile", ["superlink", "supernode"])
def test_the_compose_file_is_valid_and_starts_our_scripts_with_what_they_read(profile: str) -> None:
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", (FILES / "compose.yaml").read_text())
    stack = yaml.safe_load(text)
    PyCompose.from_yaml(yaml.safe_dump(stack)).validate()
    service = stack["services"][profile]
    assert service["profiles"] == [profile] and service["restart"] == "always"
    script = (ROOT / service["command"][0]).read_text()
    given = service["environment"].keys() - {"FLWR_HOME", "SOPPU_OPERATORS"}
    assert {name for name in given if not re.search(rf"\b{name}\b", script)} == set()
    needed = set(re.findall(r"\$\{([A-Z_]+):\?", script))
    assert needed <= given
