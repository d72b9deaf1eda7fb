"""Task: a basis that no longer fits its users grows."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from soppu.stages import grow as stage
from tasks.recording import Progress, recorded, transient


def wanted(run: str, evaluation: str) -> bool:
    """Whether a refit is due, and the configuration asks for it."""
    return stage.wanted(run, evaluation)


def refitted(run: str, set_id: str) -> str:
    """The set that a refit made of a set, in an attempt before; the set itself where there was none."""
    return stage.refitted(run, set_id)


@task(
    name="refit",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=1800,
    cache_policy=NO_CACHE,
)
def refit(run: str, set_id: str, evaluation: str) -> str:
    """Give the basis what its probes have outside it; not cached, the run folder notes what was made."""
    with recorded(run, stage.STAGE):
        return stage.refit(run, set_id, evaluation, on_progress=Progress("soppu-refit"))
