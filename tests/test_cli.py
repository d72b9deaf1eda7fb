"""The `soppu` command as a shell sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from soppu import __version__
from soppu.cli import COMMANDS, main


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
