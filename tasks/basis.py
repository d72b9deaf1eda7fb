"""Tasks: where no basis is in force, a cohort trains adapters, and one is made of them."""

from __future__ import annotations

from prefect import task

from soppu.stages import basis as stage
from soppu.stages import federate, forms
from soppu.stages.run import open_run
from tasks.recording import Progress, recorded, stage_key, transient


def cohort_wanted(run: str) -> bool:
    """Whether a run's basis is of its own making."""
    return forms.has_cohort(open_run(run))


@task(
    name="federate-cohort",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=transient,
    timeout_seconds=4 * 3600,
    cache_key_fn=stage_key,
    persist_result=True,
)
def federate_cohort(run: str) -> str:
    """Train the cohort's adapters; an attempt continues after the last finished round of the one before."""
    with recorded(run, "cohort"):
        return federate.federate_cohort(run, on_progress=Progress("soppu-cohort"))


@task(
    name="basis",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=transient,
    timeout_seconds=2 * 3600,
    cache_key_fn=stage_key,
    persist_result=True,
)
def basis(run: str, cohort: str) -> str:
    """Compress the cohort's adapters into a basis, put it in force, tell the cohort's adapters in it."""
    with recorded(run, "basis"):
        return stage.make_basis(run, cohort, on_progress=Progress("soppu-basis"))
