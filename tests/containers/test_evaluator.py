"""The evaluator's image: a comparison in a container without network, on a root that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import ContainerError

from soppu.evaluate.tradeoff import schema
from soppu.stages.federate import freeze_current
from soppu.stages.run import Run, open_run, prepare
from soppu.stages.tradeoff.run import compare
from soppu.tradeoff_settings import EvaluateConfig
from tests.docker_engine import ROOT
from tests.soppu.stages.conftest import USERS, three_users, train

pytestmark = [pytest.mark.slow, pytest.mark.long]
IMAGE = "soppu-evaluator:latest"
_OWN = 1000  # the image's user


@pytest.fixture(scope="session")
def evaluator(docker_engine: docker.DockerClient, small_image: str) -> str:
    """Name of the image, built from this tree."""
    environment = {**os.environ, "BASE": small_image, "VENV": str(ROOT / ".venv")}
    done = subprocess.run(
        ["deploy/image.sh", IMAGE, "evaluator"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(done.stderr[-2000:], pytrace=False)
    return IMAGE


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Run:
    """A run of three users with real adapters, all of it below one folder that the container's user owns."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    told = json.loads((base / "config.json").read_text())  # wide enough for HumanEval's prompts
    (base / "config.json").write_text(json.dumps({**told, "max_position_embeddings": 1024}))
    opened = open_run(prepare(str(three_users(tmp_path, base))))
    for user in USERS:
        opened.registry().put_adapter(train(opened, user), user=user, run=opened.id)
    opened.write("evaluation-first.json", {"set_id": freeze_current(str(opened.folder))})
    if not os.getuid():
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, _OWN, _OWN, follow_symlinks=False)
    return opened


def said(engine: docker.DockerClient, run: Run, *words: str, **more: Any) -> str:
    """What the evaluator says of a run that is mounted where it is."""
    folder = str(run.folder.parents[1])
    found = engine.containers.run(
        IMAGE,
        ["evaluate", str(run.folder), *words],
        user=f"{os.getuid() or _OWN}:{os.getgid() or _OWN}",
        network_mode="none",
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        volumes={folder: {"bind": folder, "mode": "rw"}},
        remove=True,
        stderr=True,
        **more,
    )
    return str(found.decode())


def test_help_is_what_it_says_by_itself(evaluator: str, docker_engine: docker.DockerClient) -> None:
    assert b"Compare ways to serve the users of RUN_DIR" in docker_engine.containers.run(
        evaluator, remove=True
    )
    words = docker_engine.containers.run(evaluator, ["-u"], entrypoint="id", remove=True)
    assert words.strip() == str(_OWN).encode()
    assert docker_engine.images.get(evaluator).attrs["Config"]["User"] == f"{_OWN}:{_OWN}"


def test_arms_are_compared_as_on_this_machine(
    evaluator: str, docker_engine: docker.DockerClient, run: Run
) -> None:
    arms = ("--arm", "personal", "--arm", "residual@4")
    table = said(docker_engine, run, *arms, "--prompts", "1", "--max-new-tokens", "4")
    assert "residual@4" in table and "tradeoff.html" in table and "WARNING" not in table.upper(), table
    found = schema.read(run.folder / schema.FILE)
    assert {"codebleu", "sacrebleu"} <= found.environment.packages.keys()
    assert "not installed" not in found.environment.packages.values()
    assert found.arms[1].tokens_s and (run.folder / schema.PAGE).exists()
    shutil.rmtree(run.folder / "tradeoff")  # so that it is measured again here
    options = EvaluateConfig(arms=("personal", "residual@4"), metrics=("loss",))
    here = schema.read(compare(str(run.folder), options=options))
    for ours, its in zip(here.arms, found.arms, strict=True):
        assert (ours.name, ours.bundle_id) == (its.name, its.bundle_id)
        assert ours.loss == pytest.approx(its.loss, rel=1e-6)


def test_programs_are_run_where_the_engine_lets_them_be_kept_apart_and_nowhere_else(
    evaluator: str, docker_engine: docker.DockerClient, run: Run
) -> None:
    words = ("--arm", "base", "--metric", "loss", "--metric", "pass_at_1", "--problems", "1")
    with pytest.raises(ContainerError, match="a program cannot be kept apart on this machine"):
        said(docker_engine, run, *words)
    folder, user = run.folder.parents[1], f"{os.getuid() or _OWN}:{os.getgid() or _OWN}"
    # by the command line: it alone knows what `systempaths` stands for
    options = ["--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", f"--user={user}"]
    options += ["--security-opt=seccomp=unconfined", "--security-opt=systempaths=unconfined"]
    command = ["docker", "run", "--rm", *options, f"--volume={folder}:{folder}", evaluator, "evaluate"]
    done = subprocess.run([*command, str(run.folder), *words], capture_output=True, text=True)
    assert "left out: pass_at_1: about zero for every arm" in done.stdout, done.stderr
