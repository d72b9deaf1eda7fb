"""Task: check everything, freeze the configuration, name the run."""

from __future__ import annotations

import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from soppu.stages import run as runs
from tasks.recording import begun, logged, note, transient


@task(
    name="prepare",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=1800,
    cache_policy=NO_CACHE,
)
def prepare(config: str, overrides: dict[str, Any] | None = None, *, text: bool = True) -> str:
    """Freeze configuration, base model and users into a run folder; the same input gives the same folder."""
    started = time.monotonic()
    run = runs.prepare(config, overrides, text=text)
    seconds = time.monotonic() - started
    note(run, "prepare", seconds=seconds)
    with logged():
        begun(run, trains=text, seconds=seconds)
    return run
