"""`make down` stops the containers that this stack's publications have started, and no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from click.testing import CliRunner
from docker.errors import NotFound

from deploy import stack
from deploy.stack import Stack
from soppu.federation.simulation import free_port
from soppu.targets import container
from soppu.targets.container import ContainerLaunch

pytestmark = pytest.mark.slow
WAITS = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(600)"
Start = Callable[[str, Path | None], ContainerLaunch]


@pytest.fixture
def start(docker_engine: docker.DockerClient, small_image: str, name: str) -> Iterator[Start]:
    """`start("a", folder)` starts a container for an owner."""
    launches = list[ContainerLaunch]()

    def begin(which: str, owner: Path | None) -> ContainerLaunch:
        url = f"http://127.0.0.1:{free_port()}"
        command = ("python3", "-c", WAITS)
        launch = ContainerLaunch(small_image, f"{name}-{which}", url, {}, command, owner=owner, pull="never")
        launches.append(launch)
        assert container.start(launch, ready=lambda: True)
        return launch

    yield begin
    for launch in launches:
        with suppress(NotFound):
            docker_engine.containers.get(launch.name).remove(force=True, v=True)


def status(launch: ContainerLaunch, engine: docker.DockerClient) -> str:
    return str(engine.containers.get(launch.name).status)


def test_down_stops_ours_and_no_others(
    start: Start, docker_engine: docker.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Stack(api="http://127.0.0.1:9/api", state=tmp_path, serve_state=tmp_path / "serve")
    monkeypatch.setattr(stack, "Stack", lambda **_: mine)
    ours, paused = start("ours", mine.serve_state), start("paused", tmp_path / "." / "serve")
    others = [start("other", tmp_path / "serve2"), start("nobodys", None)]
    docker_engine.containers.get(paused.name).pause()
    shown = CliRunner().invoke(stack.main, ["status"]).output
    assert f"{ours.name} (running)" in shown and f"{paused.name} (paused)" in shown
    assert not [one for one in others if one.name in shown]
    output = CliRunner().invoke(stack.main, ["down"]).output
    for one in (ours, paused):
        assert f"container {one.name}: stopped" in output
        assert status(one, docker_engine) == "exited"
    assert [status(one, docker_engine) for one in others] == ["running", "running"]
    assert "container" not in CliRunner().invoke(stack.main, ["down"]).output
    assert "containers: -" in CliRunner().invoke(stack.main, ["status"]).output
    assert container.start(ours, ready=lambda: True)  # it was stopped, not removed
    assert list(container.owned(mine.serve_state)) == [ours.name]


def test_one_that_was_used_and_not_started_keeps_its_owner(start: Start, tmp_path: Path) -> None:
    theirs = start("theirs", tmp_path / "theirs")
    assert not container.start(dataclasses.replace(theirs, owner=tmp_path / "mine"), ready=lambda: True)
    assert not container.owned(tmp_path / "mine")
    assert list(container.owned(tmp_path / "theirs")) == [theirs.name]
