"""Against a real Prefect server: what is deployed, and that the nightly schedule really schedules."""

from __future__ import annotations

import pytest

from deploy.stack import POOL, Stack, up, workers
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


def test_up_a_second_time_starts_nothing(stack: Stack) -> None:
    assert workers(stack)
    assert up(stack) == {"prefect server": False, "worker": False}
    assert POOL == "soppu"
