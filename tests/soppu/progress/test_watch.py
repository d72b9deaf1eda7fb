"""`soppu watch` as a person has it: on a terminal, through a pipe, twice at once, left and come back to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest

from soppu.progress.events import FILE, append
from tests.soppu.progress.recorded import LINES, RECORDED
from tests.terminal import Terminal

SOPPU = Path(sys.executable).parent / "soppu"
Start = Callable[..., Terminal]


class Run:
    """A real process that tells what it is told to tell."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.soppu.progress.a_run", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, *orders: Any) -> None:
        """Each order is written down when this returns."""
        ours, its = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)
        for order in orders:
            ours.write(json.dumps(order) + "\n")
            ours.flush()
            assert its.readline() == "ok\n"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run in its second round."""
    made = Run(tmp_path)
    made.say(["begin", ["prepare", "federate", "compress"]], ["stage", "federate"])
    made.say({"note": "round 1 of 3", "share": 0.1, "round": 1, "rounds": 3})
    made.say({"note": "round 2 of 3: 1 of 2 users", "share": 0.4, "round": 2, "rounds": 3, "user": "ann"})
    yield made
    made.process.kill()
    with made.process:
        pass


def test_attached_in_the_middle_left_and_attached_again(run: Run, terminal: Start, tmp_path: Path) -> None:
    first = terminal(SOPPU, "watch", tmp_path)
    second = terminal(SOPPU, "watch", "--runs", tmp_path.parent, size=(24, 60))
    for shown in (first, second):
        assert "federate" in shown.until("user ann") and "round 2 of 3" in shown.text
    first.key(b"\x03")
    assert first.ended() == 130
    assert f"the run goes on: soppu watch {tmp_path}" in first.text.replace("\r\n", "")
    assert run.process.poll() is None
    run.say(["warn", "cleo: no answer in time"])
    second.until("cleo: no answer in time")
    third = terminal(SOPPU, "watch", tmp_path)
    third.until("cleo: no answer in time")
    run.say(["end"], ["end"])
    for shown in (second, third):
        assert shown.ended() == 0 and "run: done in" in shown.text


def test_a_run_that_is_killed_is_told_with_what_it_was_at(run: Run, terminal: Start, tmp_path: Path) -> None:
    shown = terminal(SOPPU, "watch", tmp_path)
    shown.until("user ann")
    run.process.kill()
    assert shown.ended() == 1
    said = re.sub(r"\s+", " ", shown.text)
    assert f"Error: the run has failed: its process {run.process.pid} has died in stage federate, 40%" in said


def test_a_run_that_fails_ends_it_with_1_and_the_error(run: Run, terminal: Start, tmp_path: Path) -> None:
    shown = terminal(SOPPU, "watch", tmp_path)
    shown.until("user ann")
    run.say(["fail", "two users sent nothing"], ["fail", "two users sent nothing"])
    assert shown.ended() == 1
    assert "Error: the run has failed: FederationError: two users sent nothing" in shown.text


@pytest.mark.parametrize("when", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 9))])
def test_ctrl_c_at_any_moment_is_130(run: Run, terminal: Start, tmp_path: Path, when: int) -> None:
    """From its first byte on: while it draws, and while it is being told that the run is over."""
    shown = terminal(SOPPU, "watch", tmp_path)
    shown.until("federate")
    for _ in range(when):
        run.say({"note": f"{when}", "share": 0.5, "round": 10 + when, "rounds": 3})
    shown.key(b"\x03")
    assert shown.ended() == 130, shown.text
    assert shown.raw.count(b"\x1b[?25l") == shown.raw.count(b"\x1b[?25h") == 1  # the cursor is there again


def test_without_colours_on_a_small_terminal_in_an_ascii_locale(
    run: Run, terminal: Start, tmp_path: Path
) -> None:
    run.say({"note": "round 3 of 3: Zoë\u2026", "share": 0.5, "round": 3, "rounds": 3, "user": "Zoë"})
    plain = {"NO_COLOR": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = terminal(SOPPU, "watch", tmp_path, size=(6, 30), env=plain)
    shown.until("user Zo\\xeb")
    run.say(["end"], ["end"])
    assert shown.ended() == 0
    assert shown.raw.isascii()
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", shown.raw)


def test_through_a_pipe_it_is_the_lines_and_nothing_that_moves_a_cursor(tmp_path: Path) -> None:
    for event in RECORDED:
        append(tmp_path, event)
    done = subprocess.run([SOPPU, "watch", tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == LINES
    assert done.returncode == 1 and "nobody answers" in done.stderr


def test_through_a_pipe_a_file_that_ends_in_half_a_line_is_followed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / FILE
    with path.open("ab") as stream:
        stream.write(b'{"at": 1, "stage": "fede')
    command = [str(SOPPU), "watch", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as watch:
        assert watch.stdout
        head = [watch.stdout.readline() for _ in range(3)]
        assert head[-1] == "federate: round 2 of 3: 1 of 2 users\n"
        run.say({"note": "round 3 of 3", "share": 0.7, "round": 3, "rounds": 3}, ["end"], ["end"])
        rest = watch.stdout.read()
    assert watch.returncode == 0 and rest.startswith("federate: round 3 of 3\nfederate: done in")
