"""Task: one bundle out of a set."""

from __future__ import annotations

from prefect import task

from soppu.stages.compress import compress_set
from tasks.recording import Progress, recorded, stage_key, transient


@task(
    name="compress",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=2 * 3600,
    cache_key_fn=stage_key,
    persist_result=True,
)
def compress(run: str, set_id: str) -> str:
    """Compress all adapters of a set into one bundle, on the GPU if there is one."""
    with recorded(run, "compress"):
        return compress_set(run, set_id, on_progress=Progress("soppu-compressing"))
