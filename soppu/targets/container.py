"""A server as a container of a docker engine. Not for talking to it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, LogConfig, Mount

from soppu.errors import PortTaken, SoppuError, TargetError
from soppu.targets import logs, pull

_LABEL = "soppu.settings"
_OWNER = "soppu.owner"
_ANSWER_SECONDS = 120  # the engine's longest silence
_POLL_SECONDS = 0.2
_LOG_LINES = 1000
_GRACE_SECONDS = 30
_ROTATED = LogConfig(type=LogConfig.types.JSON, config={"max-size": "20m", "max-file": "3"})


@dataclass(frozen=True)
class ContainerLaunch:
    """A container to start.

    Attributes:
        image: name, with a tag or `@sha256:` digest.
        name: of the container.
        url: where it has to answer; host and port are published from it.
        environment: variables inside.
        command: flags after the image's entrypoint.
        mounts: (folder here, path inside, read-only).
        port: where the server listens inside.
        gpus: "" for none, "all", or device ids as in "0,1".
        shm_size: size of /dev/shm, as docker takes it.
        network: a docker network to join, "" for the default one; in "host" nothing is published.
        owner: who starts it, a folder; see `owned`. A container that is there keeps its own.
        pull: "missing" pulls an image that is not here, "always" asks the registry, "never" does neither.
        timeout: seconds until it has to be ready; pulling does not count.
    """

    image: str
    name: str
    url: str
    environment: Mapping[str, str] = field(repr=False)
    command: tuple[str, ...] = ()
    mounts: tuple[tuple[Path, str, bool], ...] = ()
    port: int = 80
    gpus: str = ""
    shm_size: str = "1g"
    network: str = ""
    owner: Path | None = None
    pull: Literal["missing", "always", "never"] = "missing"
    timeout: float = 600.0

    @property
    def settings(self) -> dict[str, str]:
        """What makes another container of it, by name; values of variables hashed: some are secret."""
        secret = {
            f"environment {name}": hashlib.sha256(value.encode()).hexdigest()[:12]
            for name, value in self.environment.items()
        }
        mounts = {
            f"mount {inside}": f"{folder.resolve()}{' (read-only)' if read_only else ''}"
            for folder, inside, read_only in self.mounts
        }
        names = ("image", "url", "port", "gpus", "shm_size", "network")
        plain = {name: str(getattr(self, name)) for name in names}
        return {**plain, "command": " ".join(self.command), **mounts, **secret}


def start(
    launch: ContainerLaunch, *, ready: Callable[[], bool], progress: Callable[[str], None] | None = None
) -> bool:
    """Have a container of these settings run, and wait until `ready()`.

    One that runs already is used, one that has stopped is started again; else one is made, after its image
    was pulled. Once ready it comes back after a crash, and with the engine. Where this fails, what this call
    has made is removed.

    Args:
        ready: whether the server answers. What it raises ends the start.
        progress: gets a line now and then while the image is pulled; without it a bar is drawn.

    Returns:
        False if it ran already.

    Raises:
        PortTaken: something else has the port.
        TargetError: no engine answers; a container of that name has other settings; the image is not here and
            cannot be pulled; a mounted folder is absent or cannot be written; the engine has no GPUs; the
            container ended, or was not ready in time: the message holds the cause its log names.
    """
    for folder, _, read_only in launch.mounts:
        _check_folder(folder, read_only)
    with _engine(f"container {launch.name} of {launch.image}") as engine:
        if launch.pull == "always":
            pull.pull(engine, launch.image, progress)
        container, made = _existing(engine, launch), False
        if container is None:
            if launch.pull == "missing":
                pull.pull_missing(engine, launch.image, progress)
            container, made = _create(engine, launch), True
        ran = container.status == "running"
        try:
            if not ran:
                _begin(engine, container, launch)
            _wait(container, launch, ready)
        except SoppuError:
            if made:
                _discard(container)
            elif not ran:
                container.stop(timeout=_GRACE_SECONDS)
            raise
        container.update(restart_policy={"Name": "unless-stopped"})
    return not ran


def stop(name: str) -> bool:
    """Stop the container of this name; it stays, to be started again. False if none ran.

    TargetError if no engine answers, or the container was not started by `start`.
    """
    with _engine(f"container {name}") as engine:
        try:
            container = engine.containers.get(name)
        except NotFound:
            return False
        if _LABEL not in container.labels:
            raise TargetError(
                f"container {name}: was not started from here: stop it by hand (docker stop {name})"
            )
        running = container.status in ("running", "restarting", "paused")
        container.stop(timeout=_GRACE_SECONDS)
        return running


def owned(owner: Path) -> dict[str, str]:
    """Containers that `start` has made for this owner and that run: name -> docker's word for its state.

    None where no engine answers, for there is nothing then that could run. TargetError if one refuses.
    """
    try:
        docker.from_env(timeout=_ANSWER_SECONDS).close()
    except DockerException:
        return {}
    label = "=".join(*_owner(owner).items())
    with _engine(f"containers of {owner}") as engine:
        running = engine.containers.list(filters={"label": [_LABEL, label]}, ignore_removed=True)
        return {container.name: container.status for container in running}


@contextmanager
def _engine(what: str) -> Iterator[docker.DockerClient]:
    """A client. What the engine refuses meanwhile is a TargetError about `what`."""
    try:
        client = docker.from_env(timeout=_ANSWER_SECONDS)
    except DockerException as error:
        where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        raise TargetError(
            f"no docker engine answers at {where}: start one (make docker-up), or name one in DOCKER_HOST:"
            f" {pull.told(error)}"
        ) from error
    try:
        yield client
    except (DockerException, requests.RequestException) as error:
        raise TargetError(f"{what}: the docker engine refused: {pull.told(error)}") from error
    finally:
        client.close()


def _check_folder(folder: Path, read_only: bool) -> None:
    if not folder.exists():
        raise TargetError(f"{folder}: no such folder to mount into the container; make it, or name another")
    if not folder.is_dir():
        raise TargetError(f"{folder}: is no folder, and only folders are mounted into the container")
    if not read_only:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise TargetError(
                f"{folder}: cannot be written, and adapters are put there: {error.strerror};"
                " free space, remount it, or name another folder"
            ) from error


def _existing(engine: docker.DockerClient, launch: ContainerLaunch) -> Container | None:
    """The container of that name, None if there is none. TargetError if it has other settings."""
    try:
        container = engine.containers.get(launch.name)
    except NotFound:
        return None
    cure = f"remove it (docker rm -f {launch.name}), or choose another name"
    if _LABEL not in container.labels:
        raise TargetError(f"container {launch.name}: is there, and was not started from here; {cure}")
    had, asked = json.loads(container.labels[_LABEL]), launch.settings
    changed = [
        name if name.startswith("environment") else f"{name} {had.get(name)!r} instead of {asked.get(name)!r}"
        for name in sorted(had.keys() | asked.keys())
        if had.get(name) != asked.get(name)
    ]
    with suppress(ImageNotFound):
        if not changed and engine.images.get(launch.image).id != container.attrs["Image"]:
            changed = [f"an older build of {launch.image}"]
    if changed:
        raise TargetError(f"container {launch.name}: has other settings: {'; '.join(changed)}; {cure}")
    return container


def _create(engine: docker.DockerClient, launch: ContainerLaunch) -> Container:
    requested = []
    if launch.gpus:
        devices = {"count": -1} if launch.gpus == "all" else {"device_ids": launch.gpus.split(",")}
        requested = [DeviceRequest(capabilities=[["gpu"]], **devices)]
    placed: dict[str, Any] = {"network": launch.network} if launch.network else {}
    if launch.network == "host":
        placed = {"network_mode": "host"}
    else:
        placed["ports"] = {f"{launch.port}/tcp": _address(launch.url)}
    try:
        return engine.containers.create(
            launch.image,
            list(launch.command),
            name=launch.name,
            environment=dict(launch.environment),
            labels={_LABEL: json.dumps(launch.settings)} | (_owner(launch.owner) if launch.owner else {}),
            mounts=[
                Mount(inside, str(folder.resolve()), type="bind", read_only=read_only)
                for folder, inside, read_only in launch.mounts
            ],
            device_requests=requested,
            shm_size=launch.shm_size,
            log_config=_ROTATED,
            **placed,
        )
    except ImageNotFound as error:
        raise TargetError(f"{launch.image}: {pull.NOT_HERE}, and is not to be pulled; {pull.CURE}") from error


def _owner(folder: Path) -> dict[str, str]:
    return {_OWNER: str(folder.resolve())}


def _address(url: str) -> tuple[str, int]:
    """(IP address, port) to publish at, of a URL as `http://127.0.0.1:8080`."""
    parts: SplitResult = urlsplit(url)
    host = parts.hostname or ""
    with suppress(ValueError):
        return str(ipaddress.ip_address(host)), parts.port or 80
    try:
        return socket.gethostbyname(host), parts.port or 80
    except OSError as error:
        raise TargetError(
            f"{url}: no address of this machine to publish the container at: {error.strerror};"
            " write it as http://127.0.0.1:8080"
        ) from error


def _begin(engine: docker.DockerClient, container: Container, launch: ContainerLaunch) -> None:
    """Start a container that does not run. Until it is ready it is not to come back by itself."""
    if container.status == "paused":
        container.unpause()
        return
    container.update(restart_policy={"Name": "no"})
    try:
        container.start()
    except APIError as error:
        reason = pull.told(error)
        if "already allocated" in reason or "address already in use" in reason:
            raise PortTaken(
                f"{launch.url}: the port is taken by {_holder(engine, launch)};"
                " stop that, or choose another port"
            ) from error
        if launch.gpus and ("device driver" in reason or "nvidia" in reason.lower()):
            raise TargetError(
                f"container {launch.name}: GPUs are asked for ({launch.gpus}), and the engine has none;"
                f" install nvidia-container-toolkit, or ask for none: {reason}"
            ) from error
        raise TargetError(f"container {launch.name}: could not be started: {reason}") from error


def _holder(engine: docker.DockerClient, launch: ContainerLaunch) -> str:
    """Who has the port, as far as the engine knows."""
    port = str(_address(launch.url)[1])
    for other in engine.containers.list():
        if any(binding["HostPort"] == port for bound in other.ports.values() for binding in bound or ()):
            return f"container {other.name}"
    return "another process"


def _wait(container: Container, launch: ContainerLaunch, ready: Callable[[], bool]) -> None:
    container.reload()
    restarts = container.attrs["RestartCount"]
    deadline = time.monotonic() + launch.timeout
    while True:
        answers = ready()
        container.reload()  # after asking: another server may be the one that answers
        state = container.attrs["State"]
        if state["Status"] != "running" or container.attrs["RestartCount"] > restarts:
            memory = ", killed for want of memory" if state["OOMKilled"] else ""
            code = f" (exit code {state['ExitCode']}{memory})"
            raise _failed(container, launch, f"ended while loading{code}")
        if answers:
            return
        if time.monotonic() > deadline:
            raise _failed(container, launch, f"was not ready after {launch.timeout:g} s")
        time.sleep(_POLL_SECONDS)


def _failed(container: Container, launch: ContainerLaunch, how: str) -> TargetError:
    """The error that names the log's cause in its one line; the end of the log is a note to it."""
    lines = container.logs(tail=_LOG_LINES).decode(errors="replace").splitlines()
    said = logs.cause(lines) or "its log is empty"
    error = TargetError(f"container {launch.name} of {launch.image} {how}: {said}")
    error.add_note(f"last lines of its log:\n{logs.tail(lines)}")
    return error


def _discard(container: Container) -> None:
    with suppress(NotFound):
        container.remove(force=True, v=True)
