"""Task: bring a bundle live at one serving target."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from soppu.stages import publish as stage
from soppu.stages import published
from tasks.recording import recorded, transient


def target_names(run: str) -> list[str]:
    """The serving targets of a run, each of which is published to by a task run of its own."""
    return published.target_names(run)


@task(
    name="publish",
    task_run_name="publish-{target}",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=3600,
    cache_policy=NO_CACHE,
)
def publish(run: str, bundle_id: str, evaluation: str, target: str) -> str:
    """Push, try every user, switch over. Not cached: what a server holds is for the server to say."""
    with recorded(run, published.stage_name(target)):
        return stage.publish(run, bundle_id, evaluation, target)
