"""From a run's configuration to its serving targets: opened, and started where nobody answers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from soppu.config import TargetConfig
from soppu.errors import TargetError
from soppu.models import BaseModel, layer_count
from soppu.serve import admin_token as tokens
from soppu.stages.run import Run
from soppu.targets import container
from soppu.targets.container import ContainerLaunch
from soppu.targets.embedded import EmbeddedTarget, ServerLaunch
from soppu.targets.http import HttpTarget
from soppu.targets.lorax import LoraxModel, LoraxTarget
from soppu.targets.lorax_volume import Volume
from soppu.targets.vllm import VllmLaunch, VllmTarget

_DATA = "/data"  # where LoRAX's image, and ours, look for adapters
_MODELS = "/models"


def target_settings(run: Run, name: str = "") -> TargetConfig:
    """The settings of one of the run's targets; "" is the first. TargetError names those there are."""
    each = run.config.serve.each()
    for settings in each:
        if name in ("", settings.label):
            return settings
    raise TargetError(f"no serving target {name!r}; there are: {', '.join(one.label for one in each)}")


def open_target(run: Run, settings: TargetConfig | None = None, *, first: Path | None = None) -> HttpTarget:
    """A serving target of a run, by default its first; the server is started if nobody answers.

    Args:
        first: the bundle a vLLM server is started with; it is not active there before it is switched to.

    Raises:
        TargetError: the server did not come up, or serves another base model; or a vLLM server has to be
            started and there is no bundle to start it with.
    """
    settings = settings or target_settings(run)
    if settings.target == "embedded":
        return _embedded(run, settings)
    if settings.target == "vllm":
        return _vllm(run, settings, first)
    return _lorax(run, settings) if settings.pushes_adapters else _container(run, settings)


def running_target(run: Run, settings: TargetConfig) -> HttpTarget | None:
    """The server of a serving target that takes bundles, where one answers; nothing is started.

    Raises:
        PortTaken, TargetError: something else answers there, or a server of another base model.
    """
    if settings.pushes_adapters:
        return None
    kind = VllmTarget if settings.target == "vllm" else EmbeddedTarget
    target = kind(settings.url, **_known(run, Path(settings.state)))
    return target if target.is_up() else None


def _known(run: Run, state: Path) -> dict[str, Any]:
    """What targets with admin routes are told: the base model, and where the token is."""
    token = os.environ.get(tokens.VARIABLE, "")
    return {"base_hash": run.base().hash, "admin_token": token, "token_file": tokens.token_file(state)}


def _embedded(run: Run, settings: TargetConfig) -> EmbeddedTarget:
    state = Path(settings.state)
    target = EmbeddedTarget(settings.url, **_known(run, state))
    target.start(
        ServerLaunch(
            model=run.config.base.model,
            cache=Path(run.config.base.cache),
            state=state,
            log=state / "server.log",
            pid_file=state / "server.pid",
            max_batch=settings.max_batch,
            resident_mib=settings.resident_mib,
            timeout=settings.start_timeout_s,
        )
    )
    return target


def _vllm(run: Run, settings: TargetConfig, first: Path | None) -> VllmTarget:
    state, base = Path(settings.state), run.base()
    target = VllmTarget(settings.url, **_known(run, state))
    if first is None:
        if not target.is_up():
            raise TargetError(f"{settings.url}: nobody answers; a vLLM server is started by a publication")
        return target
    registry = run.registry()
    live = registry.live(settings.url)  # after kill -9 it is served while the next one is tried
    launch = VllmLaunch(
        python=Path(settings.vllm_python),
        model=base.path,
        bundle=registry.bundle_path(live) if live else first,
        log=state / "vllm.log",
        pid_file=state / "vllm.pid",
        timeout=settings.start_timeout_s,
        options=("--max-num-seqs", str(settings.max_batch), *settings.vllm_options),
        environment={"SOPPU_RESIDENT_MIB": str(settings.resident_mib)},
    )
    if target.start(launch) and not live:
        target.rollback("")  # it is active from the start there, and has to pass its canaries first
    return target


def lorax_target(run: Run, settings: TargetConfig) -> LoraxTarget:
    """The LoRAX of some settings as it is, started or not."""
    base, registry = run.base(), run.registry()
    return LoraxTarget(
        settings.url,
        volume=Volume.open(settings.lorax_volume),
        model=LoraxModel(_model_id(base, settings), base.base, layer_count(base.path)),
        live=lambda: registry.live(settings.url),
        dtype=settings.lorax_dtype,
        timeout=float(settings.start_timeout_s),
    )


def _lorax(run: Run, settings: TargetConfig) -> LoraxTarget:
    volume = Path(settings.lorax_volume)
    if settings.lorax_image and "://" not in settings.lorax_volume:
        volume.mkdir(parents=True, exist_ok=True)
    launch = _launch(run.base(), settings)
    target = lorax_target(run, settings)
    _bring_up(target, replace(launch, mounts=((volume, _DATA, False), *launch.mounts)))
    return target


def _container(run: Run, settings: TargetConfig) -> EmbeddedTarget:
    """Our own image, which takes bundles by its admin routes."""
    state = Path(settings.state)
    launch = _launch(run.base(), settings)
    target = EmbeddedTarget(settings.url, **_known(run, state))
    if launch.image:
        # made here, for a container's own files are not ours to read
        token = os.environ.get(tokens.VARIABLE) or tokens.ensure(tokens.token_file(state))
        launch = replace(launch, environment={**launch.environment, tokens.VARIABLE: token})
    _bring_up(target, launch)
    return target


def _bring_up(target: HttpTarget, launch: ContainerLaunch) -> None:
    """Start the container, if an image is named; then the server that is expected has to answer."""
    if launch.image:
        container.start(launch, ready=target.is_healthy)
    if not target.is_up():
        raise TargetError(f"{target.url}: nobody answers there, and serve.lorax_image names none to start")


def _model_id(base: BaseModel, settings: TargetConfig) -> str:
    """What the container is told to serve: what was asked for, or this machine's copy as it is mounted."""
    return settings.lorax_model or (f"{_MODELS}/{base.path.name}" if settings.lorax_image else base.name)


def _launch(base: BaseModel, settings: TargetConfig) -> ContainerLaunch:
    own: dict[str, Any] = {
        "MODEL_ID": _model_id(base, settings),
        "PORT": "80",
        "DEFAULT_ADAPTER_SOURCE": "local",
    }
    mounts: tuple[tuple[Path, str, bool], ...] = ()
    if not settings.lorax_model:
        mounts = ((base.path.resolve(), own["MODEL_ID"], True),)
        own["HF_HUB_OFFLINE"] = "1"
    given = dict(text.split("=", 1) for text in settings.lorax_environment)
    return ContainerLaunch(
        image=settings.lorax_image,
        name=settings.lorax_container,
        url=settings.url,
        environment=own | given,
        command=settings.lorax_flags,
        mounts=mounts,
        gpus=settings.lorax_gpus,
        shm_size=settings.lorax_shm_size,
        network=settings.lorax_network,
        owner=Path(settings.state),
        pull=settings.lorax_pull,
        timeout=float(settings.start_timeout_s),
    )
