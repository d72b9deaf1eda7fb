"""Task: the federated simulation."""

from __future__ import annotations

from prefect import task

from soppu.stages import federate as stage
from tasks.recording import Progress, recorded, stage_key, transient


@task(
    name="federate",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=transient,
    timeout_seconds=4 * 3600,
    cache_key_fn=stage_key,
    persist_result=True,
)
def federate(run: str) -> str:
    """Train every user's adapter; an attempt continues after the last finished round of the one before."""
    with recorded(run, "federate"):
        return stage.federate(run, on_progress=Progress("soppu-federation"))
