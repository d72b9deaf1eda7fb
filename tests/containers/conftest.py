"""The engine and the images, as fixtures; and a name that no container keeps after its test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress

import docker
import pytest
from docker.errors import NotFound

from tests.docker_engine import docker_engine, small_image, soppu_image

__all__ = ["docker_engine", "name", "small_image", "soppu_image"]


@pytest.fixture
def name(docker_engine: docker.DockerClient) -> Iterator[str]:
    """Of a container that is removed after the test."""
    chosen = f"soppu-test-{uuid.uuid4().hex[:8]}"
    yield chosen
    with suppress(NotFound):
        docker_engine.containers.get(chosen).remove(force=True, v=True)
