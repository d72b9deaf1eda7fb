"""`soppu dashboard` and `soppu watch` in this process: what they begin with, print, and end with."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from click.testing import CliRunner, Result

from soppu.base_identity import Base
from soppu.cli import main
from soppu.progress import events
from soppu.progress.events import DONE, FILE, RUN, Event
from soppu.registry import Registry
from tests.soppu.dashboard.crowd import HASH, adapter
from tests.soppu.progress.recorded import LINES, RECORDED


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that was published from twice to two servers of one name, and once to another."""
    made = tmp_path_factory.mktemp("registry")
    registry = Registry.open(made)
    registry.put_adapter(adapter(0), user="ann")
    bundle = registry.put_bundle(b"one", set_id=registry.freeze_current(Base("tiny", HASH)))
    for target, url in (
        ("a", "http://127.0.0.1:7"),
        ("a", "http://127.0.0.1:8"),
        ("b", "http://127.0.0.1:9"),
    ):
        registry.record_publication(target=target, url=url, bundle_id=bundle)
    registry.close()
    return made


class _Server(uvicorn.Server):
    """The real one, of which the test knows when it is up, and which it can end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        asked.append(self)
        up.set()


asked: list[_Server] = []
up = threading.Event()


def looked_at(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[str, list[requests.Response]]:
    """What the command printed, and the answers of `/` by its own name and by another."""
    monkeypatch.setattr(uvicorn, "Server", _Server)
    asked.clear(), up.clear()
    results: list[Result] = []
    turn = sys.getswitchinterval()
    command = ["dashboard", "--port", "0", *words]
    thread = threading.Thread(target=lambda: results.append(CliRunner().invoke(main, command)))
    thread.start()
    assert up.wait(30), results
    server = asked[0]
    while not server.started:
        assert thread.is_alive(), results[0].output
    port = server.servers[0].sockets[0].getsockname()[1]
    assert sys.getswitchinterval() < turn
    names = ("127.0.0.1", "known.example", "other.example")
    told = [
        requests.get(f"http://127.0.0.1:{port}/", headers={"host": f"{name}:{port}"}, timeout=30)
        for name in names
    ]
    server.should_exit = True
    thread.join(30)
    assert results[0].exit_code == 0, results[0].output
    assert sys.getswitchinterval() == turn
    return results[0].output, told


def test_the_page_says_what_was_published_where_under_names_that_are_known(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--registry", str(root), "--runs", str(tmp_path), "--known-as", "known.example")
    said, (mine, known, other) = looked_at(monkeypatch, *words)
    assert said.startswith("http://127.0.0.1:")
    assert (mine.status_code, known.status_code, other.status_code) == (200, 200, 400)
    for place in ("a http://127.0.0.1:7", "a http://127.0.0.1:8", ">b<"):
        assert place in mine.text


def test_servers_that_are_named_are_looked_at_instead(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--registry", str(root), "--runs", str(tmp_path), "--target", "mine=https://127.0.0.1:6")
    _, (mine, *_) = looked_at(monkeypatch, *words)
    assert ">mine<" in mine.text and "a http://127.0.0.1:7" not in mine.text


def test_a_port_that_is_taken_is_told_before_any_run_is_read(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = ("--port", str(other.getsockname()[1]), "--runs", str(tmp_path))
        result = CliRunner().invoke(main, ["dashboard", "--registry", str(root), *words])
    assert result.exit_code == 1 and "cannot listen on 127.0.0.1" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "x"), "'x', allowed: NAME=http://"),
        (("--target", "x=ftp://y"), "allowed"),
        (("--target", "x=http://y", "--target", "x=http://z"), "'x' is named twice"),
    ],
)
def test_a_target_that_cannot_be_is_told(root: Path, words: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(main, ["dashboard", "--registry", str(root), *words])
    assert result.exit_code == 2 and said in result.output


def watch(*words: Any) -> Result:
    return CliRunner().invoke(main, ["watch", *map(str, words)])


def test_a_run_that_has_ended_is_told_line_by_line(tmp_path: Path) -> None:
    for event in RECORDED:
        events.append(tmp_path, event)
    result = watch(tmp_path)
    assert result.output.splitlines()[: len(LINES)] == LINES
    assert result.exit_code == 1 and "the run has failed: TargetError: nobody answers" in result.output


def test_the_newest_run_is_meant_where_none_is_named_and_links_are_none(tmp_path: Path) -> None:
    assert "holds no run that has told anything" in watch("--runs", tmp_path).output
    here = events.this_process()
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        began = Event(1.0, RUN, "began", stages=("prepare",), **here)
        for event in (began, Event(2.0, RUN, DONE, seconds=float(number), pid=began.pid)):
            events.append(tmp_path / name, event)
    (tmp_path / "latest").symlink_to("first")
    result = watch("--runs", tmp_path)
    assert result.exit_code == 0 and "run: done in 1" in result.output


def test_a_folder_in_which_no_run_has_begun_waits_for_one(tmp_path: Path) -> None:
    assert "no run has told anything there" in watch(tmp_path).output
    (tmp_path / FILE).write_text("")
    here = events.this_process()
    began = Event(1.0, RUN, "began", stages=("prepare",), **here)

    def begin() -> None:
        for event in (began, Event(2.0, RUN, DONE, seconds=1.0, pid=began.pid)):
            events.append(tmp_path, event)

    later = threading.Timer(0.3, begin)
    later.start()
    result = watch(tmp_path)
    later.join()
    assert result.output.splitlines()[0] == "no run has begun here since" and result.exit_code == 0
