"""Tasks: a new user of a fleet that is served, and users who joined at a server itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from soppu import devices
from soppu.stages import join as stage
from soppu.stages.join import Newcomer
from soppu.stages.join_collect import collect_everywhere
from tasks.recording import Progress, recorded, transient


@task(
    name="join",
    task_run_name="join-{user}",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=3600,
    cache_policy=NO_CACHE,
)
def join(run: str, user: str, data: str, own_rank: int = 0, target: str = "") -> dict[str, Any]:
    """Train a user's core, judge it, serve it; one that was killed goes on where it was. Not cached."""
    devices.use_idle_cores()
    with recorded(run, stage.stage_name(user)):
        newcomer = Newcomer(user, data, own_rank, target)
        return asdict(stage.join(run, newcomer, on_progress=Progress("soppu-join")))


@task(
    name="collect-joins",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=1800,
    cache_policy=NO_CACHE,
)
def collect(run: str) -> list[str]:
    """Take over who joined at any of a run's servers since; not cached, that changes."""
    with recorded(run, "collect joins"):
        return collect_everywhere(run)
