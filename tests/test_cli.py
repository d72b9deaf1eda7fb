"""The `soppu` command as a shell sees it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from soppu import __version__
from soppu.cli import COMMANDS, EXTRAS, main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4


def test_help_lists_every_command_and_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from soppu.cli import main;"
        "print(CliRunner().invoke(main, ['--help']).output); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "soppu --help imports torch"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.long
def test_what_a_command_loads_is_never_searched_for_garbage_and_the_rest_is() -> None:
    code = (
        "import gc; from click.testing import CliRunner; from soppu.cli import main;"
        "CliRunner().invoke(main, ['inspect', '--help']); print(gc.get_freeze_count(), gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, searching = done.stdout.split()
    assert int(frozen) > 100_000 and searching == "True"


# which hold a server's answers against a model's, or speak with a server
WITH_A_SERVER = ("expected", "publish", "pipeline", "join", "join_admit", "join_collect", "join_remote")
SERVING = {"soppu.commands.serve", "soppu.commands.join"}  # which serve, or try what is to be served


def test_what_holds_no_model_waits_for_no_model_code() -> None:
    """The code of models takes seconds and 110 MB; they would count as memory of a compression."""
    modules = [
        *sorted({f"soppu.commands.{module}" for module, _ in COMMANDS.values()} - SERVING),
        *(
            f"soppu.stages.{path.stem}"
            for path in sorted((ROOT / "soppu" / "stages").glob("[a-z]*.py"))
            if path.stem not in WITH_A_SERVER
        ),
        *("server.app", "clients.app"),
        "benchmarks.streaming",
    ]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'transformers.modeling_utils' in sys.modules: sys.exit(name)"
    )
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr.strip()} loads the code of models"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    assert COMMANDS[name][1] == command.get_short_help_str(limit=1000)


def test_completion_offers_every_command_and_loads_none() -> None:
    program = (
        "import sys; import click; from soppu.cli import main; context = click.Context(main);"
        "print(*(item.value for item in main.shell_complete(context, sys.argv[1])));"
        "sys.exit('torch' in sys.modules)"
    )
    for typed, offered in (
        ("", list(COMMANDS)),
        ("re", ["remove", "resolve", "report"]),
        ("--v", ["--version"]),
    ):
        line = [sys.executable, "-c", program, typed]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr or "completion imports torch"
        assert done.stdout.split() == offered


@pytest.mark.parametrize(
    ("command", "package"),
    [(name, package) for name, (_, packages) in EXTRAS.items() for package in packages],
)
def test_a_package_that_is_not_there_is_named_with_the_extra_that_installs_it(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 2
    assert (
        result.output
        == f"Error: soppu {command} needs {package}: pip install 'soppu[{EXTRAS[command][0]}]'\n"
    )


NAMES = {"jwt": "pyjwt[crypto]"}  # of packages that are imported by another one


def test_the_extras_named_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.values():
        for name in (NAMES.get(package, package.replace("_", "-")) for package in packages):
            assert any(need.startswith(f"{name}>=") for need in extras[extra]), name


def test_the_version_is_the_packages() -> None:
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


def test_an_error_of_ours_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["users", "--registry", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert str(tmp_path / "nowhere") in result.output
    assert "Traceback" not in result.output


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(main, ["frobnicate"])
    assert result.exit_code == 2
    assert "frobnicate" in result.output
