"""Against a real Prefect server: what is deployed, and that the nightly schedule really schedules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.stack import POOL, ROOT, Stack, down, up, workers
from tests.flows.driver import Pipeline, until

pytestmark = pytest.mark.slow


def test_both_deployments_are_listed(pipeline: Pipeline) -> None:
    listed = pipeline.prefect("deployment", "ls")
    assert "soppu/full-pipeline" in listed
    assert "soppu-recompress/nightly" in listed


def test_the_nightly_deployment_gets_scheduled_runs_within_a_minute(pipeline: Pipeline) -> None:
    deployment = pipeline.api("deployments/name/soppu-recompress/nightly")
    assert [item["schedule"]["cron"] for item in deployment["schedules"]] == ["0 3 * * *"]
    waiting = {
        "deployments": {"id": {"any_": [deployment["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    assert until(lambda: pipeline.api("flow_runs/filter", waiting), timeout=60)


@pytest.mark.long
def test_down_and_up_again_has_a_worker_that_works(stack: Stack) -> None:
    """The worker that runs the pipelines of the other file."""
    assert down(stack)["worker"]
    assert up(stack) == {"prefect server": True, "worker": True}
    assert workers(stack)


def test_prefect_in_this_folder_talks_to_the_local_stack() -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [str(Path(sys.executable).parent / "prefect"), "config", "view"]
    shown = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    assert f"PREFECT_API_URL='{Stack().api}'" in shown


@pytest.mark.long
def test_up_a_second_time_starts_nothing(stack: Stack) -> None:
    assert workers(stack)
    assert up(stack) == {"prefect server": False, "worker": False}
    assert POOL == "soppu"
