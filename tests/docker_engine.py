"""A docker engine for tests: one that answers, or, as root, one of their own; and images in it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException, ImageNotFound

ROOT = Path(__file__).parents[1]
OFFICIAL, OWN_BASE = "python:3.11-slim-bookworm", "soppu-base:bookworm"
IMAGE = "soppu-server:latest"


def _run(*command: str) -> str:
    """What a script of `deploy/` says; the test is failed with its last words where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.stderr[-2000:]}", pytrace=False)
    return done.stdout


def _answering() -> docker.DockerClient | None:
    try:
        return docker.from_env()
    except DockerException:
        return None


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[docker.DockerClient]:
    """A client of an engine. One that was started for the tests is ended after them."""
    started = False
    if (client := _answering()) is None:
        if os.geteuid() != 0 or os.environ.get("DOCKER_HOST"):
            pytest.skip("no docker engine answers, and only root can start one: make docker-up")
        started = "started" in _run("deploy/engine.sh", "up")
        client = docker.from_env()
    yield client
    client.close()
    if started:
        _run("deploy/engine.sh", "down")


@pytest.fixture(scope="session")
def small_image(docker_engine: docker.DockerClient) -> str:
    """Name of an image with python3 and little else."""
    for name in (OWN_BASE, OFFICIAL):
        try:
            docker_engine.images.get(name)
            return name
        except ImageNotFound:
            continue
    if os.geteuid() != 0:
        pytest.skip(f"neither {OWN_BASE} nor {OFFICIAL} is here, and only root can make the former")
    _run("deploy/base-image.sh", OWN_BASE)
    return OWN_BASE


@pytest.fixture(scope="session")
def soppu_image(docker_engine: docker.DockerClient, small_image: str) -> str:
    """Name of the embedded server's image, built from this tree; in seconds where only `soppu` changed."""
    _run("env", f"BASE={small_image}", f"VENV={ROOT / '.venv'}", "deploy/image.sh", IMAGE)
    return IMAGE
