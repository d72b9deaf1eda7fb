"""The file: what is written is read, whatever else is in it, and whoever else writes to it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu.errors import FederationError
from soppu.progress import events, telling
from soppu.progress.events import BEGAN, DONE, FAILED, FILE, RUN, WARNED, Event, Reader, append
from soppu.progress.picture import picture
from tests.soppu.progress.recorded import RECORDED


def written(folder: Path) -> list[Event]:
    return Reader(folder / FILE).read()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for event in RECORDED:
        append(tmp_path, event)
    assert written(tmp_path) == RECORDED


def test_a_file_cut_anywhere_gives_the_lines_before_the_cut_and_loses_none_that_come_later(
    tmp_path: Path,
) -> None:
    for event in RECORDED[:4]:
        append(tmp_path, event)
    path, whole = tmp_path / FILE, (tmp_path / FILE).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (*ends, *range(ends[1], ends[2], 9)):
        path.write_bytes(whole[:cut])
        before = sum(end <= cut for end in ends)
        assert written(tmp_path) == RECORDED[:before]
        append(tmp_path, RECORDED[5])
        assert written(tmp_path)[-1] == RECORDED[5]
        assert written(tmp_path)[:before] == RECORDED[:before]


def test_a_line_that_is_still_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    reader, path = Reader(tmp_path / FILE), tmp_path / FILE
    assert reader.read() == []
    append(tmp_path, RECORDED[0])
    line = path.read_bytes()
    path.write_bytes(line + line[:20])
    assert reader.read() == [RECORDED[0]] and reader.read() == []
    path.write_bytes(line + line)
    assert reader.read() == [RECORDED[0]] and reader.read() == []


@given(st.binary(max_size=40))
@settings(max_examples=50)
def test_a_line_of_any_bytes_is_no_event_and_no_error(line: bytes) -> None:
    assert events.parse(line) is None


@pytest.mark.parametrize(
    "line", ["", "1", "[]", "{}", "null", '"x"', '{"at": 1}', '{"at": NaN}', "[" * 10**5]
)
def test_json_of_another_form_is_no_event(line: str) -> None:
    assert events.parse(line.encode()) is None


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Event)])
@pytest.mark.parametrize("bad", [{}, [[]], True])
def test_a_line_with_a_value_of_another_kind_is_no_event(name: str, bad: object) -> None:
    values = {"at": 1.0, "stage": "x", name: bad}
    found = events.parse(json.dumps(values).encode())
    assert found is None or (name == "stages" and bad == [[]])


def test_keys_of_a_later_version_are_passed_over() -> None:
    assert events.parse(b'{"at": 1, "stage": "x", "colour": "red"}') == Event(1, "x")


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(100):
            append(tmp_path, Event(1.0, f"stage {number}", note="x" * 900))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written(tmp_path)) == 400


def test_a_stage_that_says_much_writes_little_and_loses_neither_a_round_nor_a_warning(tmp_path: Path) -> None:
    heard: list[object] = []
    with telling.stage(tmp_path, "federate", on_progress=heard.append) as tell:
        for number in range(1, 4):
            for step in range(500):
                tell({"note": f"step {step}", "share": 0.5, "round": number, "rounds": 3})
        tell({"note": "late", "share": 0.9, "round": 3, "warning": "ann: crashed"})
    found = written(tmp_path)
    assert len(heard) == 1501 and len(found) < 60
    assert {event.round for event in found if event.round} == {1, 2, 3}
    assert [event.note for event in found if event.state == WARNED] == ["ann: crashed"]
    assert [found[0].state, found[-1].state] == [BEGAN, DONE]


def test_warnings_of_ours_are_told_of_the_stage_whose_thread_gave_them(tmp_path: Path) -> None:
    log = logging.getLogger("soppu.stages.evaluate")

    def other() -> None:
        with telling.stage(tmp_path, "publish b"):
            log.warning("of b")

    with telling.stage(tmp_path, "publish a"):
        log.warning("of a")
        log.info("not a warning")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    log.warning("of nobody")
    told = {(event.stage, event.note) for event in written(tmp_path) if event.state == WARNED}
    assert told == {("publish a", "of a"), ("publish b", "of b")}


@pytest.mark.parametrize("error", [FederationError("killed"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_ends_a_stage_ends_the_run_and_is_named(tmp_path: Path, error: BaseException) -> None:
    telling.begin(tmp_path, ("federate",), of="flow")
    with pytest.raises(type(error)), telling.ending(tmp_path), telling.stage(tmp_path, "federate"):
        raise error
    found = picture(written(tmp_path))
    assert found.ended == FAILED and type(error).__name__ in found.error
    assert ("stopped from outside" in found.error) is not isinstance(error, Exception)
    assert found.stages["federate"].state == FAILED


def test_a_folder_that_cannot_be_written_to_ends_no_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone"
    telling.begin(gone, ("x",))
    with telling.ending(gone), telling.stage(gone, "x") as tell:
        tell({"note": "on it", "share": 0.5})
    assert "progress is not written" in caplog.text


def test_a_run_that_begins_again_is_another_and_a_neighbour_s_lines_are_not_its(tmp_path: Path) -> None:
    for event in RECORDED:
        append(tmp_path, event)
    append(tmp_path, Event(2000.0, RUN, BEGAN, pid=9, stages=("compress",)))
    append(tmp_path, Event(2001.0, "federate", note="the first process, still at it", share=0.5, pid=7))
    found = picture(written(tmp_path))
    assert list(found.stages) == ["compress"] and not found.ended


def test_a_file_that_has_grown_large_is_put_aside_when_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(tmp_path / FILE)
    monkeypatch.setattr(events, "_MOST_BYTES", 2000)
    for _ in range(3):
        telling.begin(tmp_path, ("a",) * 100)
        assert reader.read()[-1].stages
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "progress.before.jsonl"} or (
        (tmp_path / FILE).stat().st_size < 4000
    )


def refused(process: psutil.Process) -> str:
    """As a system answers that hides others' processes."""
    raise psutil.AccessDenied(process.pid)


def test_a_process_that_was_killed_is_gone_and_one_that_lives_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soppu.progress.a_run", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        process.stdin.write('["begin", ["federate"]]\n')
        process.stdin.flush()
        assert process.stdout.readline() == "ok\n"
        (began,) = written(tmp_path)
        assert began.pid == process.pid and not events.is_gone(began)
        assert not events.is_gone(dataclasses.replace(began, machine="another"))
        assert events.is_gone(
            dataclasses.replace(began, since=began.since - 100)
        )  # its number is another's now
        with pytest.MonkeyPatch.context() as hidden:
            hidden.setattr(psutil.Process, "status", refused)
            assert not events.is_gone(began)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended
        assert events.is_gone(began)
    assert events.is_gone(began)
