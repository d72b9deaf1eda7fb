"""Task: the arms of a run side by side, where its configuration names any."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from soppu.stages.tradeoff import judge as stage
from tasks.recording import Progress, recorded, transient


def wanted(run: str) -> bool:
    """Whether a run's configuration asks for the comparison."""
    return stage.wanted(run)


@task(
    name="tradeoff",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=4 * 3600,
    cache_policy=NO_CACHE,
)
def tradeoff(run: str, evaluation: str) -> str:
    """Measure what is not measured yet, judge the gate's rules; not cached: what was measured is kept."""
    with recorded(run, "tradeoff"):
        judged = stage.tradeoff(run, evaluation, on_progress=Progress("soppu-tradeoff-progress"))
    create_markdown_artifact(judged.markdown, key="soppu-tradeoff", description="Arms: quality and cost")
    create_link_artifact(judged.plot.as_uri(), key="soppu-tradeoff-plot", link_text=judged.plot.name)
    create_link_artifact(judged.path.as_uri(), key="soppu-tradeoff-file", link_text=judged.path.name)
    return judged.evaluation
