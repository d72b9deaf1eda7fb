"""Task: what every user keeps of their gain."""

from __future__ import annotations

from prefect import task

from soppu.stages import evaluate as stage
from tasks.recording import Progress, recorded, stage_key, transient


@task(
    name="evaluate",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=2 * 3600,
    cache_key_fn=stage_key,
    persist_result=True,
)
def evaluate(run: str, set_id: str, bundle_id: str) -> str:
    """Held-out loss of every user: base, shared, personal and compressed; and the gate's verdict."""
    with recorded(run, "evaluate"):
        return stage.evaluate(run, set_id, bundle_id, on_progress=Progress("soppu-evaluation"))
