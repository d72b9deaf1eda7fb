"""Images come from a registry: by tag and by digest, once or always; and an engine that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import ImageNotFound

from soppu.errors import TargetError
from soppu.targets import container, pull
from soppu.targets.container import ContainerLaunch
from tests.containers.registry import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def image(docker_engine: docker.DockerClient) -> Iterator[tuple[str, str]]:
    """Name and digest of an image that a registry here has."""
    with serving() as (repository, digest):
        yield repository, digest
        for found in docker_engine.images.list(repository):
            docker_engine.images.remove(found.id, force=True)


@pytest.mark.parametrize("by", ["tag", "digest", "neither"])
def test_an_image_is_pulled_when_it_is_missing_and_no_more(
    by: str, image: tuple[str, str], docker_engine: docker.DockerClient
) -> None:
    repository, digest = image
    name = {"tag": f"{repository}:v1", "digest": f"{repository}@{digest}", "neither": repository}[by]
    said: list[str] = []
    assert pull.pull_missing(docker_engine, name, said.append)
    assert docker_engine.images.get(name).attrs["RepoDigests"] == [f"{repository}@{digest}"]
    assert all(line.startswith(f"pulling {name}: 0.0 of 0.0 GB") for line in said)
    assert not pull.pull_missing(docker_engine, name, said.append)


def test_one_that_is_here_is_asked_for_again_only_where_always_is_said(
    image: tuple[str, str], docker_engine: docker.DockerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{image[0]}:v1"
    pull.pull(docker_engine, name, None)
    pull.pull(docker_engine, name, None)
    assert capsys.readouterr().err == ""  # no bar where nobody looks


def test_a_damaged_layer_is_no_image(docker_engine: docker.DockerClient) -> None:
    with serving(damaged=True) as (repository, _):
        with pytest.raises(TargetError, match=rf"{repository}:v1: .*cannot be pulled: .*make image"):
            pull.pull(docker_engine, f"{repository}:v1", None)
        with pytest.raises(ImageNotFound):
            docker_engine.images.get(f"{repository}:v1")


@pytest.mark.parametrize("where", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:9", "nonsense"])
def test_where_no_engine_answers(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", where)
    launch = ContainerLaunch("any", "any", "http://127.0.0.1:8080", {}, mounts=((tmp_path, "/data", False),))
    for act in (lambda: container.start(launch, ready=lambda: True), lambda: container.stop("any")):
        with pytest.raises(
            TargetError, match=f"no docker engine answers at {where}: .*make docker-up"
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
