"""Tasks: from adapters in the registry to a frozen set."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from soppu.stages import federate as stage
from tasks.recording import recorded, transient


@task(
    name="collect",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=1800,
    cache_policy=NO_CACHE,
)
def collect(run: str, federation: str) -> str:
    """Check a federation's adapters, make them current, freeze everybody's; not cached, that changes."""
    with recorded(run, "collect"):
        return stage.collect(run, federation)


@task(
    name="freeze-current",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=1800,
    cache_policy=NO_CACHE,
)
def freeze_current(run: str) -> str:
    """Freeze every user's current adapter; not cached, because what is current changes."""
    with recorded(run, "collect"):
        return stage.freeze_current(run)
