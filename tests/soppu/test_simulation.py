"""Owning processes: ours are all ended, nobody else's is touched. Starts neither Flower nor Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from soppu.federation import simulation
from soppu.federation.simulation import Simulation

MARK = simulation._MARK
Spawn = Callable[..., subprocess.Popen[bytes]]

BREEDER = """
import os, time
for _ in range(200):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.003)
time.sleep(60)
"""


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """`spawn(code, mark="x")`: a Python process under a mark; whatever is left at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str, *, mark: str = "") -> subprocess.Popen[bytes]:
        environment = {**os.environ, **({MARK: mark} if mark else {})}
        command = [sys.executable, "-c", f"print('up', flush=True)\n{code}"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_two(mark: str) -> None:
    deadline = time.monotonic() + 30
    while len(marked(mark)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def test_only_processes_of_the_mark_are_ended(spawn: Spawn, tmp_path: Path) -> None:
    ours, other = simulation.mark_of(tmp_path / "ours"), simulation.mark_of(tmp_path / "other")
    sleep = "import time; time.sleep(60)"
    mine = [spawn(sleep, mark=ours) for _ in range(2)]
    stranger, plain = spawn(sleep, mark=other), spawn(sleep)
    assert simulation.end_processes(ours) == 2
    assert [process.wait(timeout=30) is not None for process in mine] == [True, True]
    assert stranger.poll() is None and plain.poll() is None
    assert simulation.end_processes(ours) == 0
    assert simulation.end_processes(other) == 1


def test_grandchildren_in_sessions_of_their_own_are_ended_too(spawn: Spawn, tmp_path: Path) -> None:
    """Ray and Flower start theirs detached: neither the parent's death nor its group reaches them."""
    mark = simulation.mark_of(tmp_path)
    child = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']"
    )
    child += ", start_new_session=True); time.sleep(60)"
    parent = spawn(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])", mark=mark)
    parent.wait(timeout=30)  # gone, and its descendants are orphans
    wait_for_two(mark)
    assert simulation.end_processes(mark) == 2
    assert marked(mark) == []


def test_what_is_forked_while_the_list_is_read_is_ended_too(spawn: Spawn, tmp_path: Path) -> None:
    mark = simulation.mark_of(tmp_path)
    spawn(BREEDER, mark=mark)
    wait_for_two(mark)
    assert simulation.end_processes(mark) > 1
    assert marked(mark) == []


def test_the_mark_belongs_to_the_folder_not_to_the_attempt(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert simulation.mark_of(tmp_path / "a") == simulation.mark_of(tmp_path / "link")
    assert simulation.mark_of(tmp_path / "a") == simulation.mark_of(tmp_path / "b" / ".." / "a")
    assert simulation.mark_of(tmp_path / "a") != simulation.mark_of(tmp_path / "b")


def test_the_environment_is_a_run_of_its_own_and_goes_with_it(tmp_path: Path) -> None:
    before = dict(os.environ)
    run = Simulation(tmp_path, tmp_path / "config.toml", tmp_path, users=1, client_cpus=2)
    with simulation._environment(run) as (environment, port):
        home = Path(environment["FLWR_HOME"])
        assert f"127.0.0.1:{port}" in (home / "config.toml").read_text()
        assert len(environment["RAY_TMPDIR"]) < 40  # Ray's socket paths have 107 characters
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert environment[MARK] == simulation.mark_of(tmp_path)
        assert environment["OMP_NUM_THREADS"] == "2"
    assert not home.exists()
    assert dict(os.environ) == before


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", simulation.free_port()))


def test_the_tail_is_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert simulation.tail(log) == "(no log)"
    log.write_bytes(b"\n".join(b"line %d \xff" % n for n in range(40)))
    assert simulation.tail(log, lines=2) == "line 38 \ufffd\nline 39 \ufffd"
