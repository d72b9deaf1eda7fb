"""`soppu report`: the page comes back from report.json, the summary is printed, faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from soppu.commands.report import report_command
from soppu.errors import SoppuError
from soppu.evaluate import report
from tests.soppu.evaluate.example import make_report

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    report.write(tmp_path, make_report(3))
    return tmp_path


def test_the_page_is_rendered_again_and_the_summary_printed(run: Path) -> None:
    page = (run / "report.html").read_bytes()
    stored = (run / "report.json").read_bytes()
    (run / "report.html").unlink()
    result = CliRunner().invoke(report_command, [str(run)])
    assert result.exit_code == 0
    assert (run / "report.html").read_bytes() == page
    assert (run / "report.json").read_bytes() == stored
    assert "user-0002" in result.output and f"report:  {run / 'report.html'}" in result.output
    assert "curl -s http://127.0.0.1:8099/generate" in result.output


def test_open_prints_only_the_path(run: Path) -> None:
    result = CliRunner().invoke(report_command, ["--open", str(run)])
    assert (result.exit_code, result.output) == (0, f"{run / 'report.html'}\n")


def test_a_folder_without_a_report_and_no_folder_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(report_command, [str(tmp_path)])
    assert isinstance(result.exception, SoppuError) and "report.json: no such file" in str(result.exception)
    assert CliRunner().invoke(report_command, [str(tmp_path / "absent")]).exit_code == 2


def test_a_damaged_report_leaves_the_page_as_it_was(run: Path) -> None:
    page = (run / "report.html").read_bytes()
    (run / "report.json").write_text((run / "report.json").read_text().replace('"loss_base"', '"loss"'))
    result = CliRunner().invoke(report_command, [str(run)])
    assert isinstance(result.exception, SoppuError) and "users[0].loss_base: missing" in str(result.exception)
    assert (run / "report.html").read_bytes() == page
