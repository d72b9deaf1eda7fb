"""What the live page knows of run folders: reports that come, change and go, and what they say of users."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from soppu.dashboard import reading, runs
from soppu.dashboard.measured import Measured, write
from soppu.dashboard.reading import RunLine
from soppu.dashboard.runs import Runs
from soppu.evaluate import report
from soppu.evaluate.tradeoff import schema
from soppu.progress import events
from tests.soppu.evaluate.example import make_report
from tests.soppu.evaluate.tradeoff.example import comparison
from tests.soppu.progress.recorded import RECORDED

USERS = ["alice", "bob", "alice%40example.com"]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return make_report(users=USERS)


def folder(root: Path, name: str, told: dict[str, Any], **changes: Any) -> Path:
    """A run folder with such a report."""
    made = root / name
    made.mkdir(parents=True, exist_ok=True)
    (made / report.JSON_FILE).write_text(json.dumps({**told, **changes}))
    return made


def compared(run: Path, *users: str) -> None:
    """A comparison with one example of each of these users."""
    (run / schema.FILE).write_text(json.dumps(comparison()))
    lines = [json.dumps({"user": user, "prompt": f"für {user}", "texts": {}}) for user in users]
    (run / comparison()["texts"]).write_text("\n".join(lines))


def python(path: Path, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of Python's are this shell script."""
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_run_is_what_its_report_says_and_users_have_what_it_says_of_them(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    refused = {**told["gate"], "passed": False, "reasons": ["bob lost", "ann too"]}
    folder(tmp_path, "older", told, created="2025-01-01T00:00:00+00:00", gate=refused)
    folder(tmp_path, "newer", told)
    seen = Runs(tmp_path)
    seen.refresh()
    newer, older = seen.lines()
    assert (newer.name, newer.users, newer.passed, older.reasons) == (
        "newer",
        3,
        True,
        ("bob lost", "ann too"),
    )
    assert newer.bytes == told["compression"]["bytes_after"] and newer.seconds == pytest.approx(180.9)
    assert [seen.standing(one).word for one in (newer, older)] == ["passed", "refused"]
    assert seen.standing(older).why == "bob lost; ann too"
    found = seen.of_users(["alice%40example.com", "nobody"])
    facts = {one["id"]: one for one in told["users"]}["alice%40example.com"]
    assert found["nobody"] == [] and found["alice%40example.com"] == [(newer, facts), (older, facts)]


def test_examples_are_the_users_own_and_none_of_a_file_that_was_written_anew(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    run = folder(tmp_path, "run", told)
    seen = Runs(tmp_path)
    seen.refresh()
    assert seen.texts("run", "alice") == seen.texts("absent", "alice") == []
    compared(run, "bob", "alice", "bob", "alice", "alice", "alice")
    seen.refresh()
    assert [one["prompt"] for one in seen.texts("run", "alice")] == ["für alice"] * 3
    assert len(seen.texts("run", "bob")) == 2
    texts = run / comparison()["texts"]
    texts.write_text("\n".join(reversed(texts.read_text().splitlines())))
    assert all(one["user"] == "bob" for one in seen.texts("run", "bob"))
    texts.write_text("[]")
    assert seen.texts("run", "bob") == []
    texts.unlink()
    assert seen.texts("run", "bob") == []


def test_what_changes_is_read_again_and_what_goes_is_gone(tmp_path: Path, told: dict[str, Any]) -> None:
    run = folder(tmp_path, "run", told)
    seen = Runs(tmp_path)
    seen.refresh()
    (run / report.JSON_FILE).write_text("{")
    seen.refresh()
    assert seen.standing(seen.lines()[0]).word == "unreadable" and seen.of_users(["bob"]) == {"bob": []}
    folder(tmp_path, "run", told, users=told["users"][:1])
    seen.refresh()
    assert seen.lines()[0].users == 1
    (run / report.JSON_FILE).unlink()
    seen.refresh()
    assert seen.lines() == [] and seen.line("run") is None
    assert Runs(tmp_path / "absent").lines() == []


def test_of_many_runs_the_newest_have_their_users_at_hand(tmp_path: Path, told: dict[str, Any]) -> None:
    for number in range(10):
        folder(tmp_path, f"run-{number}", told, created=f"2026-01-0{number}T00:00:00+00:00")
    seen = Runs(tmp_path)
    seen.refresh()
    assert [line.name for line, _ in seen.of_users(["bob"])["bob"]] == [f"run-{n}" for n in range(9, 1, -1)]
    assert len(seen.lines()) == 10


def test_when_newer_runs_go_the_users_of_older_ones_are_read_again(
    tmp_path: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_KEPT", 1)
    monkeypatch.setattr(reading, "read_apart", reading.read)
    for number in range(2):
        folder(tmp_path, f"run-{number}", told, created=f"2026-01-0{number + 1}T00:00:00+00:00")
    seen = Runs(tmp_path)
    seen.refresh()
    (tmp_path / "run-1" / report.JSON_FILE).unlink()
    seen.refresh()
    assert seen.of_users(["bob"]) == {"bob": []} and seen.standing(seen.lines()[0]).word == "being read"
    seen.read_large()
    assert [line.name for line, _ in seen.of_users(["bob"])["bob"]] == ["run-0"]
    assert seen.standing(seen.lines()[0]).word == "passed"


def test_where_nothing_can_be_kept_the_line_says_so_and_the_next_look_goes_on(
    tmp_path: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, "run", told)
    seen = Runs(tmp_path)
    shutil.rmtree(seen._place.name)  # as a disk that is full
    seen.refresh()
    assert "cannot be kept here" in seen.standing(seen.lines()[0]).why
    assert seen.of_users(["bob"]) == {"bob": []}


def test_a_folder_that_cannot_be_read_hides_no_other(tmp_path: Path, told: dict[str, Any]) -> None:
    folder(tmp_path, "run", told)
    (tmp_path / "odd" / events.FILE).mkdir(parents=True)
    (tmp_path / "odd" / "config.toml").write_text("")
    seen = Runs(tmp_path)
    seen.refresh()
    stands = {line.name: seen.standing(line).word for line in seen.lines()}
    assert stands == {"run": "passed", "odd": "no report"} and not seen.flights()


@pytest.mark.parametrize("texts", ["{", '{"user": "bob"}\n[]\n', None])
def test_a_comparison_that_is_being_written_takes_nothing_from_the_report(
    tmp_path: Path, told: dict[str, Any], texts: str | None
) -> None:
    run = folder(tmp_path, "run", told)
    (run / schema.FILE).write_text(json.dumps(comparison()) if texts else "{")
    (run / comparison()["texts"]).write_text(texts or "")
    found = reading.read(RunLine("run", str(run), "2026-01-01"), tmp_path / "file")
    assert (found.fault, found.users, bool(found.texts)) == ("", 3, texts is not None)
    assert Measured(tmp_path / "file").places("bob", limit=9) == ([0] if texts and "bob" in texts else [])


def test_a_run_without_a_verdict_says_what_became_of_it(tmp_path: Path) -> None:
    for name, told in (("failed", RECORDED), ("quiet", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("")
        for event in told:
            events.append(tmp_path / name, event)
    seen = Runs(tmp_path)
    seen.refresh()
    stands = {line.name: seen.standing(line) for line in seen.lines()}
    assert stands["failed"].word == "failed" and "nobody answers" in stands["failed"].why
    assert (stands["quiet"].word, stands["quiet"].why) == ("no report", "")


def test_a_large_report_waits_and_is_read_beside(
    tmp_path: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_LARGE", 10)
    monkeypatch.setattr(reading, "read_apart", reading.read)  # the other process: below
    compared(folder(tmp_path, "run", told), "bob")
    seen = Runs(tmp_path)
    for _ in range(2):
        seen.refresh()
        assert seen.standing(seen.lines()[0]).word == "being read" and seen.texts("run", "bob") == []
    seen.read_large()
    seen.refresh()
    assert seen.standing(seen.lines()[0]).word == "passed" and len(seen.texts("run", "bob")) == 1


@pytest.mark.long
def test_another_process_reads_the_same_and_its_end_is_told(tmp_path: Path, told: dict[str, Any]) -> None:
    compared(folder(tmp_path, "run", told), "bob")
    line = RunLine("run", str(tmp_path / "run"), "2026-01-01")
    apart, here = tmp_path / "apart", tmp_path / "here"
    assert reading.read_apart(line, apart) == reading.read(line, here)
    assert Measured(apart).of(USERS) == Measured(here).of(USERS)
    assert "cannot be kept here" in reading.read_apart(line, tmp_path / "absent" / "file").fault


def test_another_process_that_ends_badly_is_the_fault_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = "[ $4 = quiet ] || echo no memory is left >&2\nkill -9 $$"
    python(tmp_path / "python", ends, monkeypatch)
    line = RunLine("run", str(tmp_path), "2026-01-01")
    assert reading.read_apart(line, tmp_path / "file").fault == (
        "its report could not be read: no memory is left"
    )
    quiet = RunLine("run", str(tmp_path), "quiet")
    assert reading.read_apart(quiet, tmp_path / "file").fault.endswith("it ended with -9")


def test_the_other_process_says_the_line_and_writes_the_file(
    tmp_path: Path,
    told: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = folder(tmp_path, "run", told)
    reading.tell(str(run), "2026-01-01", str(tmp_path / "file"))
    said = capsys.readouterr().out
    assert json.loads(said)["name"] == "run" and json.loads(said)["users"] == 3
    assert Measured(tmp_path / "file").of(["bob"]).keys() == {"bob"}
    (tmp_path / "said").write_text(said)
    python(tmp_path / "python", f"cat {tmp_path}/said", monkeypatch)
    line = RunLine("run", str(run), "2026-01-01")
    assert reading.read_apart(line, tmp_path / "apart") == reading.read(line, tmp_path / "here")


def test_a_file_of_users_has_no_name_once_it_is_open_and_nothing_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a name ? with # signs"
    write(path, [{"id": "ann"}], [("ann", 5), ("ann", 0), ("bob", 7)])
    opened = Measured(path)
    assert not path.exists() and opened.of(["ann", "bob"]) == {"ann": {"id": "ann"}}
    assert opened.places("ann", limit=9) == [0, 5] and opened.places("ann", limit=1) == [0]
    opened.close()
    assert opened.of(["ann"]) == {} and opened.places("ann", limit=9) == []
