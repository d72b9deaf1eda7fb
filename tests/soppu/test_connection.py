"""Runs on a SuperLink that is there already: a real one, Flower's commands, a ServerApp of a few lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soppu.errors import FederationError, SuperLinkAway
from soppu.federation import connection
from soppu.federation.connection import Remote
from soppu.federation.simulation import free_port

pytestmark = [pytest.mark.slow, pytest.mark.long]

APP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tried"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "soppu"
[tool.flwr.app.components]
serverapp = "program:app"
clientapp = "program:other"
[tool.flwr.app.config]
config = ""
workdir = ""
task = ""
"""
# Does what the file says that a run's configuration is: one word for each time that it is started.
PROGRAM = """
import json, time
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
app = ServerApp()
other = ClientApp()

@app.main()
def main(grid, context):
    settings, work = context.run_config, Path(context.run_config["workdir"])
    words = Path(settings["config"]).read_text().split()
    starts = work / "starts"
    done = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("." * (done + 1))
    word = words[min(done, len(words) - 1)]
    (work / "progress.json").write_text(json.dumps({"note": word, "share": 0.5}))
    if word == "fail":
        raise ValueError("no user is here")
    if word == "hang":
        time.sleep(300)
    (work / "result.json").write_text(json.dumps({"task": settings["task"], "starts": done + 1}))
"""


class SuperLink:
    """One of Flower's, without a database: what it knew is gone when it ends."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.log = folder / "superlink.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        scripts = str(Path(sys.executable).parent)
        environment = {**connection.environment(), "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--disable-runtime-dependency-installation"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    folder = tmp_path_factory.mktemp("flower")
    link = SuperLink(folder)
    connections = f'[superlink.ours]\naddress = "127.0.0.1:{link.port}"\ninsecure = true\n'
    (folder / "config.toml").write_text(connections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(folder))
        yield link
        link.stop()


@pytest.fixture
def remote(tmp_path: Path, superlink: SuperLink) -> Callable[..., Remote]:
    """`remote("hang done")`: what the ServerApp does when it is started once, twice."""

    def make(words: str, **changes: Any) -> Remote:
        app = tmp_path / "app"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(APP)
        (app / "program.py").write_text(PROGRAM)
        (tmp_path / "words").write_text(words)
        made = Remote(app, "ours", tmp_path / "words", tmp_path / "work", task="evaluate", timeout_s=120)
        return replace(made, **changes)

    return make


def status(number: str) -> str:
    return str(connection.flower("ls", "ours", "--run-id", number)["runs"][0]["status"])


def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def started(work: Path) -> str:
    """The run that has been started in a work folder, once its ServerApp is at work."""
    until(lambda: (work / "progress.json").exists())
    return str(json.loads((work / connection.RUN).read_text())["run-id"])


def test_a_superlink_is_waited_for_and_one_that_forgot_the_run_is_given_it_again(
    superlink: SuperLink, remote: Callable[..., Remote], tmp_path: Path
) -> None:
    with pytest.raises(SuperLinkAway, match="flwr ls"):
        connection.flower("ls", "ours")
    said: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    run = remote("hang done")
    waiting = threading.Thread(target=lambda: found.append(connection.run(run, on_progress=said.append)))
    waiting.start()
    until(lambda: any("waiting for the SuperLink" in one["note"] for one in said))
    superlink.start()
    started(run.workdir)
    superlink.stop()
    superlink.start()
    waiting.join(timeout=120)
    assert found == [{"task": "evaluate", "starts": 2}]
    assert {"note": "hang", "share": 0.5} in said and {"note": "done", "share": 0.5} in said


def test_a_run_that_fails_is_told_with_its_reason_and_the_next_attempt_is_a_new_one(
    remote: Callable[..., Remote],
) -> None:
    run = remote("fail done")
    with pytest.raises(FederationError, match="no user is here"):
        connection.run(run)
    assert connection.run(run) == {"task": "evaluate", "starts": 2}


@pytest.mark.parametrize("way", ["cancelled", "killed"])
def test_a_run_nobody_waits_for_any_more_is_stopped(remote: Callable[..., Remote], way: str) -> None:
    run = remote("hang")
    if way == "cancelled":

        def cancel(said: dict[str, Any]) -> None:
            if said["note"] == "hang":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            connection.run(run, on_progress=cancel)
    else:
        places = ", ".join(
            f"{name}=Path({str(getattr(run, name))!r})" for name in ("app", "config", "workdir")
        )
        code = "from pathlib import Path; from soppu.federation.connection import Remote, run;"
        code += f"run(Remote(connection='ours', {places}))"
        process = subprocess.Popen([sys.executable, "-c", code])
        started(run.workdir)
        process.kill()
        process.wait()
    number = started(run.workdir)
    until(lambda: status(number) == "finished:stopped")


def test_what_an_earlier_attempt_left_is_stopped_first(remote: Callable[..., Remote]) -> None:
    run = remote("hang done")
    run.workdir.mkdir()
    left = connection._submit(run)
    started(run.workdir)
    assert connection.run(run)["starts"] == 2
    assert status(left) == "finished:stopped"


def test_what_flower_refuses_is_told_in_its_words(remote: Callable[..., Remote]) -> None:
    with pytest.raises(FederationError, match="'theirs' not found"):
        connection.run(remote("done", connection="theirs"))
    with pytest.raises(FederationError, match="pyproject.toml"):
        connection.run(remote("done", app=Path(__file__).parent))
