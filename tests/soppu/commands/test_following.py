"""A run that is shown until it ends, in this process: its lines, its screen, and how the command ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from soppu.cli import main
from soppu.commands import following
from soppu.commands.following import finish, show
from soppu.commands.listening import Told
from soppu.progress.events import BEGAN, DONE, FAILED, RUN, Event, append
from soppu.progress.followed import Followed
from soppu.progress.picture import Picture
from tests.soppu.progress.recorded import LINES, RECORDED, event


class Source:
    """A folder to which events are added, one at each look, and then what somebody else knows of the end."""

    def __init__(self, folder: Path, events: list[Event], over: tuple[str, str] = ("", "")) -> None:
        self._followed, self._folder = Followed(folder), folder
        self._events: Iterator[Event] = iter(events)
        self._over, self._now = over, ("", "")

    def look(self) -> Followed:
        try:
            append(self._folder, next(self._events))
        except StopIteration:
            self._now = self._over
        return self._followed

    def over(self) -> tuple[str, str]:
        return self._now

    def waiting(self) -> str:
        return "waiting for a worker"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LOOK_S", 0.0)


def test_without_a_terminal_every_line_is_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = show(Source(tmp_path, RECORDED), Told(), title="runs/demo")
    assert found.ended == FAILED and found.error == "TargetError: nobody answers"
    assert capsys.readouterr().out.splitlines() == LINES


def test_a_run_that_begins_anew_in_the_folder_is_printed_from_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [event(300, RUN, BEGAN, stages=("collect",)), event(301, RUN, DONE, seconds=1.0)]
    assert show(Source(tmp_path, [*RECORDED[:5], *again]), Told(), title="").ended == DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == LINES[0] and lines[-2:] == ["run: collect", "run: done in 1 s"]


def test_what_somebody_else_knows_of_the_end_counts_where_the_folder_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = show(Source(tmp_path, [], (FAILED, "crashed: no memory")), Told(), title="")
    assert (found.ended, found.error) == (FAILED, "crashed: no memory")
    assert capsys.readouterr().out.splitlines() == ["waiting for a worker"]


def test_a_signal_ends_the_showing_and_not_the_run(tmp_path: Path) -> None:
    found = show(Source(tmp_path, RECORDED), Told(signal.SIGINT), title="")
    assert found.ended == ""


def test_on_a_terminal_it_is_a_screen_and_the_end_stays_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    done = [*RECORDED[:9], event(40, RUN, DONE, seconds=40.0)]
    assert show(Source(tmp_path, done), Told(), title="runs/demo").ended == DONE
    shown = capsys.readouterr().out
    assert "waiting for a worker" not in shown or shown.index("waiting") < shown.index("federate")
    assert "runs/demo" in shown and "round 2 of 3" in shown and "\x1b[?25h" in shown
    assert shown.rstrip().endswith("run: done in 40 s")


@pytest.mark.parametrize(
    ("found", "number", "code", "said"),
    [
        (Picture(ended=DONE), 0, 0, ""),
        (Picture(), signal.SIGINT, 130, "left; the run goes on"),
        (Picture(ended=DONE), signal.SIGTERM, 143, "left; the run has ended: done"),
    ],
)
def test_a_command_ends_as_its_run_or_as_it_was_told(
    found: Picture, number: int, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(click.exceptions.Exit) as ended:
        finish(found, Told(number), left="left; the run goes on")
    assert ended.value.exit_code == code and capsys.readouterr().out.strip() == said


def test_a_run_that_failed_is_an_error_that_names_its_own() -> None:
    with pytest.raises(click.ClickException, match="the run has failed: DataError: no text"):
        finish(Picture(ended=FAILED, error="DataError: no text"), Told(), left="")


def test_watch_takes_the_run_that_was_heard_of_last_and_names_a_folder_without_one(tmp_path: Path) -> None:
    (tmp_path / "demo-1").mkdir()
    for one in RECORDED:
        append(tmp_path / "demo-1", one)
    (tmp_path / "latest").symlink_to("demo-1")
    seen = CliRunner().invoke(main, ["watch", "--runs", str(tmp_path)])
    assert seen.exit_code == 1 and seen.stdout.splitlines() == LINES
    assert "the run has failed: TargetError: nobody answers" in seen.stderr
    empty = tmp_path / "demo-1" / "empty"
    empty.mkdir()
    for words, said in (
        (["--runs", str(empty)], "holds no run that has told anything"),
        ([str(empty)], "no run has told anything there"),
    ):
        refused = CliRunner().invoke(main, ["watch", *words])
        assert refused.exit_code == 1 and f"{empty}: {said}" in refused.stderr
