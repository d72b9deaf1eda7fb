"""A container as a server's process, with a real engine: started once, used again; what a failure says."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest
import requests
from docker.errors import NotFound

from soppu.errors import PortTaken, TargetError
from soppu.federation.simulation import free_port
from soppu.targets import container
from soppu.targets.container import ContainerLaunch
from soppu.targets.http import request

pytestmark = pytest.mark.slow
SERVER = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # of no signal by itself
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(3)
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ["WHO"].encode())
http.server.HTTPServer(("", 80), Handler).serve_forever()
"""


def python(program: str) -> tuple[str, ...]:
    return ("python3", "-c", program)


@pytest.fixture
def launch(small_image: str, name: str) -> ContainerLaunch:
    """A small server that says who it is."""
    url = f"http://127.0.0.1:{free_port()}"
    who = {"WHO": "alice", "SOPPU_ADMIN_TOKEN": "a-secret"}
    return ContainerLaunch(small_image, name, url, who, python(SERVER), timeout=60.0)


def change(launch: ContainerLaunch, **fields: object) -> ContainerLaunch:
    return dataclasses.replace(launch, **fields)  # type: ignore[arg-type]


def answers(launch: ContainerLaunch) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            return request("GET", launch.url, timeout=(1.0, 1.0)).text == launch.environment["WHO"]
        except requests.RequestException:
            return False

    return ready


def start(launch: ContainerLaunch) -> bool:
    return container.start(launch, ready=answers(launch))


def refused(launch: ContainerLaunch, error: type[TargetError] = TargetError) -> str:
    """The one line a start is refused with; it has to leave no container where there was none."""
    with closing(docker.from_env()) as engine:
        named = {"name": launch.name}  # others come and go
        before = {one.id for one in engine.containers.list(all=True, filters=named)}
        with pytest.raises(error) as caught:
            start(launch)
        assert {one.id for one in engine.containers.list(all=True, filters=named)} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_container_is_started_once_stopped_and_started_again(
    launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    assert start(launch)
    first = docker_engine.containers.get(launch.name).id
    assert not start(launch)
    assert container.stop(launch.name)
    assert not answers(launch)()
    assert not container.stop(launch.name)
    assert start(launch)
    assert docker_engine.containers.get(launch.name).id == first
    docker_engine.containers.get(launch.name).pause()
    assert start(launch)
    assert docker_engine.containers.get(launch.name).id == first


def test_a_name_that_no_container_has_is_no_error_to_stop(name: str) -> None:
    assert not container.stop(name)


def test_it_comes_back_after_a_crash(launch: ContainerLaunch) -> None:
    start(launch)
    with pytest.raises(requests.ConnectionError):
        request("GET", f"{launch.url}/die", timeout=(1.0, 5.0))
    deadline = time.monotonic() + 30
    while not answers(launch)():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_settings_reach_the_container(launch: ContainerLaunch, docker_engine: docker.DockerClient) -> None:
    program = SERVER.replace('os.environ["WHO"]', 'open("/there/who").read()')
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / launch.name
    folder.mkdir()
    try:
        (folder / "who").write_text("alice")
        mounts = ((folder, "/there", True),)
        start(change(launch, command=python(program), mounts=mounts, shm_size="96m"))
        inside = docker_engine.containers.get(launch.name)
        assert inside.exec_run(["stat", "-f", "-c", "%b %S", "/dev/shm"]).output.split() == [
            b"24576",
            b"4096",
        ]
        assert inside.exec_run(["touch", "/there/new"]).exit_code != 0
    finally:
        (folder / "who").unlink()
        folder.rmdir()


OTHER_SETTINGS: list[tuple[dict[str, object], str]] = [
    ({"environment": {"WHO": "alice", "SOPPU_ADMIN_TOKEN": "other"}}, "environment SOPPU_ADMIN_TOKEN"),
    ({"environment": {"WHO": "alice"}}, "environment SOPPU_ADMIN_TOKEN"),
    ({"command": ("python3", "-V")}, "command .* instead of 'python3 -V'"),
    ({"shm_size": "2g"}, "shm_size '1g' instead of '2g'"),
    ({"mounts": ((Path("/usr"), "/data", True),)}, r"mount /data None instead of '/usr \(read-only\)'"),
]


def test_one_with_other_settings_is_left_and_named(launch: ContainerLaunch) -> None:
    start(launch)
    for fields, named in OTHER_SETTINGS:
        expected = rf"{launch.name}: .*{named}.*docker rm -f {launch.name}"
        with pytest.raises(TargetError, match=expected) as caught:
            start(change(launch, **fields))
        assert "secret" not in str(caught.value)
    assert answers(launch)()


def test_an_older_build_of_the_image_is_named(
    launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    tag = f"{launch.name}:latest"
    docker_engine.images.get(launch.image).tag(tag)
    try:
        start(change(launch, image=tag))
        newer = f"FROM {launch.image}\nLABEL newer=yes\n".encode()
        docker_engine.images.build(fileobj=io.BytesIO(newer), tag=tag, rm=True)
        with pytest.raises(TargetError, match=f"an older build of {tag}"):
            start(change(launch, image=tag))
    finally:
        container.stop(launch.name)
        docker_engine.images.remove(tag, force=True)


def test_a_container_of_somebody_else_is_neither_used_nor_stopped(
    launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    other = docker_engine.containers.run(
        launch.image, ["sleep", "60"], name=launch.name, detach=True, init=True
    )
    with pytest.raises(TargetError, match=f"{launch.name}: .*not started from here.*docker rm -f"):
        start(launch)
    with pytest.raises(TargetError, match=f"not started from here.*docker stop {launch.name}"):
        container.stop(launch.name)
    other.reload()
    assert other.status == "running"


LORAX_SAYS = '{"level":"ERROR","fields":{"message":"Shard 0 failed\\nRuntimeError: no kernel image"}}'


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise RuntimeError('CUDA out of memory')", r"\(exit code 1\): RuntimeError: CUDA out of memory"),
        (f"print({LORAX_SAYS!r}); print('bye'); raise SystemExit(4)", r"code 4\): RuntimeError: no kernel"),
        ("print('the model is not there'); raise SystemExit(2)", r"code 2\): the model is not there"),
        ("import os; os._exit(7)", r"\(exit code 7\): its log is empty"),
    ],
)
def test_one_that_dies_while_loading_says_why_and_is_removed(
    program: str, said: str, launch: ContainerLaunch
) -> None:
    ending = change(launch, command=python(program))
    message = refused(ending)
    assert message.startswith(f"container {launch.name} of {launch.image} ended while loading")
    assert re.search(said, message)


def test_the_end_of_the_log_is_a_note(launch: ContainerLaunch) -> None:
    with pytest.raises(TargetError) as caught:
        start(change(launch, command=python("print('first words'); raise ValueError('no')")))
    assert "first words" in caught.value.__notes__[0]


def test_what_another_server_answers_does_not_count(launch: ContainerLaunch) -> None:
    dead = change(launch, command=python("raise OSError('no such device')"))
    with pytest.raises(TargetError, match="OSError: no such device"):
        container.start(dead, ready=lambda: time.sleep(2.0) is None)


def test_one_that_is_started_again_and_dies_stays_to_be_looked_at(
    launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    once = "if os.path.exists('/once'): raise RuntimeError('twice')\nopen('/once', 'w')"
    twice = change(launch, command=python(f"import os\n{once}\n{SERVER}"))
    start(twice)
    container.stop(launch.name)
    with pytest.raises(TargetError, match="ended while loading.*RuntimeError: twice"):
        start(twice)
    assert docker_engine.containers.get(launch.name).status == "exited"


def test_one_that_is_never_ready_is_removed(launch: ContainerLaunch) -> None:
    message = refused(
        change(
            launch,
            environment={"WHO": "bob", "OTHER": ""},
            command=python("print('loading shard 3 of 9', flush=True); import time; time.sleep(60)"),
            timeout=1.5,
        )
    )
    assert "was not ready after 1.5 s: loading shard 3 of 9" in message


def test_what_the_question_raises_ends_the_start(
    launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    def ready() -> bool:
        raise TargetError("serves another base model")

    with pytest.raises(TargetError, match="^serves another base model$"):
        container.start(launch, ready=ready)
    with pytest.raises(NotFound):
        docker_engine.containers.get(launch.name)


def test_a_port_that_a_process_has(launch: ContainerLaunch) -> None:
    with socket.create_server(("127.0.0.1", int(launch.url.rpartition(":")[2]))):
        message = refused(launch, PortTaken)
    assert message == f"{launch.url}: the port is taken by another process; stop that, or choose another port"


def test_a_port_that_a_container_has(launch: ContainerLaunch) -> None:
    start(launch)
    message = refused(change(launch, name=f"{launch.name}-2"), PortTaken)
    assert f"{launch.url}: the port is taken by container {launch.name}" in message


@pytest.mark.parametrize(
    ("image", "policy", "said"),
    [
        ("localhost:9/soppu-nowhere:1", "missing", "cannot be pulled: .*make image"),
        ("localhost:9/soppu-nowhere@sha256:" + "0" * 64, "always", "cannot be pulled: .*refused"),
        ("soppu-nowhere:1", "never", "is not to be pulled; .*make image"),
        ("soppu nowhere", "missing", "invalid reference"),
        ("Soppu:1", "never", "must be lowercase"),
    ],
)
def test_an_image_that_is_not_here(image: str, policy: str, said: str, launch: ContainerLaunch) -> None:
    message = refused(change(launch, image=image, pull=policy))
    assert re.search(rf"{image}.*{said}", message), message


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`tmpfs("ro")`: a file system of one's own, for what a folder's rights do not keep root from."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root may mount")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "soppu-test", tmp_path], check=True)
        mounted.append(tmp_path)
        return tmp_path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize(("options", "said"), [("ro", "Read-only"), ("nr_inodes=1", "No space left")])
def test_a_volume_that_takes_no_file(
    options: str, said: str, tmpfs: Callable[[str], Path], launch: ContainerLaunch
) -> None:
    folder = tmpfs(options)
    message = refused(change(launch, mounts=((folder, "/data", False),)))
    assert message.startswith(f"{folder}: cannot be written, and adapters are put there: {said}")


def test_a_volume_that_is_not_there_or_no_folder(launch: ContainerLaunch, tmp_path: Path) -> None:
    gone, file = tmp_path / "gone", tmp_path / "file"
    file.touch()
    assert f"{gone}: no such folder" in refused(change(launch, mounts=((gone, "/data", False),)))
    assert not gone.exists()
    assert f"{file}: is no folder" in refused(change(launch, mounts=((file, "/data", True),)))


@pytest.mark.parametrize("gpus", ["all", "0,1"])
def test_gpus_where_the_engine_has_none(
    gpus: str, launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    if "nvidia" in docker_engine.info()["Runtimes"]:
        pytest.skip("this engine has a runtime with GPUs")
    message = refused(change(launch, gpus=gpus))
    assert f"{launch.name}: GPUs are asked for ({gpus}), and the engine has none" in message


def test_a_network_is_joined_and_one_that_is_not_there_is_named(
    launch: ContainerLaunch, docker_engine: docker.DockerClient
) -> None:
    assert f"{launch.name}-net" in refused(change(launch, network=f"{launch.name}-net"))
    network = docker_engine.networks.create(f"{launch.name}-net")
    try:
        assert start(change(launch, network=network.name))
        inside = docker_engine.containers.get(launch.name)
        assert network.name in inside.attrs["NetworkSettings"]["Networks"]
        inside.remove(force=True)
    finally:
        network.remove()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://no-such-host.invalid:8080", "no address of this machine"),
        ("http://203.0.113.7:8080", "203.0.113.7"),
    ],
)
def test_an_address_that_is_not_this_machine_s(url: str, said: str, launch: ContainerLaunch) -> None:
    assert said in refused(change(launch, url=url))
