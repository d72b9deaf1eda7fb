"""From settings to a serving target: how a server would be started, and what is said where none can be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from soppu.errors import TargetError
from soppu.federation.simulation import free_port
from soppu.serve import admin_token as tokens
from soppu.stages.run import Run
from soppu.stages.targets import lorax_target, open_target, target_settings
from soppu.targets import container
from soppu.targets.container import ContainerLaunch
from soppu.targets.lorax import LoraxTarget
from soppu.targets.vllm import VllmLaunch, VllmTarget

NOWHERE = f"http://127.0.0.1:{free_port()}"
LORAX = {"serve.target": "lorax", "serve.url": NOWHERE}
IMAGE = {**LORAX, "serve.lorax_image": "soppu-server:latest", "serve.lorax_pull": "never"}


@pytest.fixture(autouse=True)
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default volume, which is relative, below a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / ".soppu" / "lorax"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ContainerLaunch]:
    """Containers that were asked for; none is started, so none answers."""
    found: list[ContainerLaunch] = []
    monkeypatch.setattr(container, "start", lambda launch, ready: bool(found.append(launch)) or not ready())
    monkeypatch.delenv(tokens.VARIABLE, raising=False)
    return found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({**LORAX, "serve.lorax_image": ""}, "serve.lorax_image names none to start"),
        ({**LORAX, "serve.lorax_image": "", "serve.form": "bundle"}, "serve.lorax_image names none to start"),
        ({"serve.target": "vllm", "serve.url": NOWHERE}, "a vLLM server is started by a publication"),
    ],
)
def test_where_nobody_answers_and_none_can_be_started_that_is_said(run: Run, said: str) -> None:
    with pytest.raises(TargetError, match=f"{NOWHERE}: nobody answers.*{said}"):
        open_target(run)


@pytest.mark.parametrize(
    "overrides", [{"serve.targets": [{"name": "here"}, {"name": "there", "target": "vllm", "url": NOWHERE}]}]
)
def test_a_target_is_found_by_its_name_and_those_there_are_are_named(run: Run) -> None:
    assert target_settings(run).label == "here" and target_settings(run, "there").target == "vllm"
    with pytest.raises(TargetError, match="no serving target 'else'; there are: here, there"):
        target_settings(run, "else")


@pytest.mark.parametrize("overrides", [{**IMAGE, "serve.lorax_environment": ["RUST_LOG=info", "PORT=8080"]}])
def test_lorax_is_given_the_model_of_this_machine_and_a_volume_to_read(
    run: Run, started: list[ContainerLaunch], volume: Path
) -> None:
    volume.rmdir()
    with pytest.raises(TargetError, match="nobody answers there"):
        open_target(run)
    (launch,) = started
    base = run.base().path
    assert launch.mounts == ((volume, "/data", False), (base, f"/models/{base.name}", True))
    assert volume.is_dir() and (launch.image, launch.pull) == ("soppu-server:latest", "never")
    assert launch.environment == {
        "MODEL_ID": f"/models/{base.name}",
        "PORT": "8080",  # as the settings say
        "DEFAULT_ADAPTER_SOURCE": "local",
        "HF_HUB_OFFLINE": "1",
        "RUST_LOG": "info",
    }


@pytest.mark.parametrize("overrides", [{**IMAGE, "serve.lorax_model": "org/model", "serve.form": "bundle"}])
@pytest.mark.parametrize("given", ["", "a-secret"])
def test_our_image_is_given_a_token_and_fetches_a_model_that_is_named(
    run: Run, started: list[ContainerLaunch], given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given:
        monkeypatch.setenv(tokens.VARIABLE, given)
    with pytest.raises(TargetError, match="nobody answers there"):
        open_target(run)
    (launch,) = started
    assert launch.mounts == () and launch.environment["MODEL_ID"] == "org/model"
    assert "HF_HUB_OFFLINE" not in launch.environment
    file = tokens.token_file(Path(run.config.serve.state))
    assert launch.environment[tokens.VARIABLE] == (given or file.read_text().strip())
    assert file.exists() != bool(given)


@pytest.mark.parametrize("overrides", [{**LORAX, "serve.lorax_image": ""}])
def test_a_lorax_that_is_there_is_asked_for_the_model_by_its_own_name(run: Run, tmp_path: Path) -> None:
    target = lorax_target(run, target_settings(run))
    assert isinstance(target, LoraxTarget) and target.url == NOWHERE
    assert target._model.name == run.base().name and target._model.layers == 8


@pytest.mark.parametrize("overrides", [{"serve.target": "vllm", "serve.url": NOWHERE}])
def test_vllm_is_started_with_a_bundle_that_is_not_active_before_its_canaries(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[VllmLaunch] = []
    told: list[Any] = []
    monkeypatch.setattr(VllmTarget, "start", lambda self, launch: bool(launches.append(launch)) or True)
    monkeypatch.setattr(VllmTarget, "rollback", lambda self, bundle: told.append(bundle))
    monkeypatch.setattr(type(run.registry()), "live", lambda self, url: "")
    open_target(run, first=tmp_path / "first.soppu")
    assert launches[0].bundle == tmp_path / "first.soppu" and told == [""]
    assert launches[0].model == run.base().path and launches[0].options[0] == "--max-num-seqs"
    monkeypatch.setattr(type(run.registry()), "live", lambda self, url: "ab" * 32)
    monkeypatch.setattr(type(run.registry()), "bundle_path", lambda self, bundle: Path("/live") / bundle)
    open_target(run, first=tmp_path / "second.soppu")  # after a kill: what users have stays
    assert launches[1].bundle == Path("/live") / ("ab" * 32) and told == [""]
    assert os.environ.get(tokens.VARIABLE, "") == ""
