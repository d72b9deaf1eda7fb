"""Against a real Prefect server: what is deployed, and that the nightly schedule really schedules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.stack import POOL, ROOT, Stack, down, up, workers
from soppu.federation.simulation import free_port
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


def test_down_and_up_again_has_a_worker_that_works(tmp_path: Path) -> None:
    made = Stack(
        api=f"http://127.0.0.1:{free_port()}/api", state=tmp_path / "state", serve_state=tmp_path / "serve"
    )
    try:
        assert up(made) == {"prefect server": True, "worker": True}
        assert down(made)["worker"]
        assert up(made) == {"prefect server": True, "worker": True}
        assert workers(made)
    finally:
        down(made)


def test_prefect_in_this_folder_talks_to_the_local_stack() -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [str(Path(sys.executable).parent / "prefect"), "config", "view"]
    shown = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    assert f"PREFECT_API_URL='{Stack().api}'" in shown


def test_up_a_second_time_starts_nothing(stack: Stack) -> None:
    assert workers(stack)
    assert up(stack) == {"prefect server": False, "worker": False}
    assert POOL == "soppu"
