"""The embedded server's image: what is in it, as whom it runs, and that LoRAX's own settings start it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container
from docker.types import Mount

from soppu.federation.simulation import free_port
from soppu.targets import container
from soppu.targets.container import ContainerLaunch
from soppu.targets.embedded import EmbeddedTarget
from soppu.targets.http import request

pytestmark = pytest.mark.slow


@pytest.fixture
def volume(tmp_path: Path, tiny_base: Path) -> Path:
    """A folder with a base model in it, which the image's own user may read."""
    folder = tmp_path / "volume"
    shutil.copytree(tiny_base, folder / "base")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def healthy(inside: Container) -> bool:
    """Whether the image's own check passes within its first few turns."""
    for _ in range(60):
        inside.reload()
        if inside.attrs["State"]["Health"]["Status"] == "healthy":
            return True
        time.sleep(0.5)
    return False


def test_lorax_s_settings_start_it_and_it_answers(
    soppu_image: str, name: str, volume: Path, docker_engine: docker.DockerClient
) -> None:
    environment = {
        "MODEL_ID": "/data/base",
        "PORT": "80",
        "DEFAULT_ADAPTER_SOURCE": "local",
        "HUGGINGFACE_HUB_CACHE": "/data",
        "MAX_ACTIVE_ADAPTERS": "8",
        "SOPPU_ADMIN_TOKEN": "a-secret",
    }
    url = f"http://127.0.0.1:{free_port()}"
    launch = ContainerLaunch(
        soppu_image, name, url, environment, mounts=((volume, "/data", True),), pull="never", timeout=120.0
    )
    target = EmbeddedTarget(url, admin_token="a-secret")

    def ready() -> bool:
        try:
            return request("GET", f"{url}/health", timeout=(1.0, 1.0)).status_code == 200
        except OSError:
            return False

    assert container.start(launch, ready=ready)
    inside = docker_engine.containers.get(name)
    assert inside.exec_run(["id", "-u"]).output.strip() == b"1000"
    assert inside.exec_run(["touch", "/opt/library/new"]).exit_code != 0
    assert target.complete("def main", max_new_tokens=4)
    assert target.bundles() == ()
    assert EmbeddedTarget(url).is_up()
    assert request("GET", f"{url}/soppu/v1/bundles", timeout=(1.0, 5.0)).status_code == 401
    assert healthy(inside)
    assert container.stop(name)
    inside.reload()
    assert inside.attrs["State"]["ExitCode"] == 0  # it was asked to stop, and did


@pytest.mark.long
def test_it_stops_at_once_while_it_loads(
    soppu_image: str, name: str, volume: Path, docker_engine: docker.DockerClient
) -> None:
    weights = volume / "base" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights, 0o644)
    weights.chmod(0o644)
    inside = docker_engine.containers.run(
        soppu_image,
        name=name,
        detach=True,
        environment={"MODEL_ID": "/data/base", "HF_HUB_OFFLINE": "1"},
        mounts=[Mount("/data", str(volume), type="bind", read_only=True)],
    )
    with weights.open("wb"):  # waits until it is read; a container's first process hears no signal by itself
        inside.kill("SIGTERM")
        assert inside.wait(timeout=60)["StatusCode"] == 0
    log = inside.logs().decode()
    assert log.splitlines()[-1].endswith("stopped by SIGTERM before it served") and "Traceback" not in log


@pytest.mark.long
def test_a_model_that_is_not_in_the_volume_is_named(soppu_image: str, name: str, volume: Path) -> None:
    launch = ContainerLaunch(
        soppu_image,
        name,
        f"http://127.0.0.1:{free_port()}",
        {"MODEL_ID": "/data/other", "HF_HUB_OFFLINE": "1"},
        mounts=((volume, "/data", True),),
        timeout=120.0,
    )
    with pytest.raises(container.TargetError, match=f"{name} of .* ended while loading .*/data/other"):
        container.start(launch, ready=lambda: False)


def test_it_holds_nothing_to_build_with_and_is_small(
    soppu_image: str, small_image: str, docker_engine: docker.DockerClient
) -> None:
    words = "cc gcc g++ make pip ld apt-get"
    looked = docker_engine.containers.run(
        soppu_image, ["-c", f"command -v {words} || true"], entrypoint="sh", remove=True
    )
    assert looked == b""
    base = docker_engine.images.get(small_image).attrs["Size"]
    assert docker_engine.images.get(soppu_image).attrs["Size"] - base < 1_000_000_000
