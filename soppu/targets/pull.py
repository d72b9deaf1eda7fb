"""Images of a docker engine: whether one is here, and bringing it here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from docker.utils import parse_repository_tag
from tqdm import tqdm

from soppu.errors import TargetError

NOT_HERE = "no image of this name is here"
CURE = "`make image` builds ours, `docker load` brings one without a network"
_REPORT_SECONDS = 5.0


def pull_missing(engine: docker.DockerClient, image: str, progress: Callable[[str], None] | None) -> bool:
    """Pull an image unless it is here; whether it was pulled. TargetError as `pull`."""
    try:
        engine.images.get(image)
    except ImageNotFound:
        pull(engine, image, progress)
        return True
    return False


def pull(engine: docker.DockerClient, image: str, progress: Callable[[str], None] | None) -> None:
    """Pull what the registry has under this name, showing how far it is. TargetError if that fails."""
    repository, tag = parse_repository_tag(image)
    try:
        events = engine.api.pull(repository, tag=tag or "latest", stream=True, decode=True)
        _follow(image, events, progress)
    except DockerException as error:
        raise TargetError(f"{image}: {NOT_HERE}, and it cannot be pulled: {told(error)}; {CURE}") from error


def told(error: Exception) -> str:
    """What the engine said, in one line."""
    said = error.explanation if isinstance(error, APIError) and error.explanation else error
    return " ".join(str(said).split())


def _follow(image: str, events: Iterable[dict[str, Any]], progress: Callable[[str], None] | None) -> None:
    """Show the bytes of all layers together: as a bar, or as a line every few seconds."""
    layers: dict[str, tuple[int, int]] = {}
    reported = 0.0
    with tqdm(desc=image, unit="B", unit_scale=True, disable=True if progress else None) as bar:
        for event in events:
            if "error" in event:
                raise DockerException(event["error"])
            detail = event.get("progressDetail") or {}
            if event.get("status") != "Downloading" or not detail.get("total"):
                continue
            layers[event["id"]] = (detail["current"], detail["total"])
            here, bar.total = (sum(part) for part in zip(*layers.values(), strict=True))
            bar.update(here - bar.n)
            if progress and time.monotonic() - reported > _REPORT_SECONDS:
                progress(f"pulling {image}: {here / 1e9:.1f} of {bar.total / 1e9:.1f} GB")
                reported = time.monotonic()
