"""Task: the report of a run, and its artifacts in Prefect's UI."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from soppu.stages import report as stage
from tasks.recording import logged, transient


@task(
    name="report",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=600,
    cache_policy=NO_CACHE,
)
def report(run: str, evaluation: str) -> str:
    """Write report.json and report.html with what is known by now; show them in Prefect."""
    with logged():
        written = stage.write_report(run, evaluation)
    create_markdown_artifact(written.users_markdown, key="soppu-users", description="Every user's gain")
    create_markdown_artifact(written.compression_markdown, key="soppu-compression", description="Compression")
    create_link_artifact(
        written.html.as_uri(), key="soppu-report", link_text=f"Report of {written.html.parent.name}"
    )
    return str(written.html.parent)
