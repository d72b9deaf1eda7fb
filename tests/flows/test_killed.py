"""What is killed goes on where it was; a server that is not there keeps no other from its bundle."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from deploy.stack import up
from soppu.federation.simulation import end_processes, free_port, mark_of
from soppu.registry import Registry
from tests.flows.driver import Pipeline, until

pytestmark = [pytest.mark.slow, pytest.mark.long]

OUTAGE_S = float(os.environ.get("SOPPU_TEST_OUTAGE_S", "4"))  # by hand: a minute


def test_a_killed_simulation_is_retried_to_the_same_number_of_adapters(
    tiny_pipeline: Pipeline,
) -> None:
    pipeline = tiny_pipeline
    pipeline.overrides |= {"federation.rounds": 20}  # long enough to be caught in the middle
    flow_run = pipeline.submit("soppu/full-pipeline")
    runs = pipeline.folder / "runs"

    def in_the_rounds() -> Path | None:
        for progress in runs.glob("*/federation/progress.json"):
            if "round 2" in json.loads(progress.read_text())["note"]:
                return progress.parent
        return None

    federation = until(in_the_rounds, timeout=240, every=0.05)
    assert end_processes(mark_of(federation)) > 0
    pipeline.completed(flow_run)
    attempts = json.loads((federation.parent / "stages" / "federate.json").read_text())["attempts"]
    assert attempts >= 2
    registry = Registry.open(pipeline.folder / "registry")
    assert set(registry.current_set()) == {"ann", "bob", "cleo"}


def test_a_killed_worker_a_server_that_is_away_and_a_target_that_is_gone_cost_nothing_else(
    tiny_pipeline: Pipeline,
) -> None:
    pipeline, others = tiny_pipeline, tiny_pipeline.run_folders()
    pipeline.overrides |= {"compress.ratio": 3.0}  # a run of its own, of the training there is
    first = pipeline.submit("soppu/full-pipeline")

    def compressed() -> bool:
        tasks = pipeline.task_runs(first)
        return "compress" in tasks and tasks["compress"]["state_type"] == "COMPLETED"

    until(compressed, timeout=300, every=0.1)
    kill(pipeline, "worker")
    (folder,) = pipeline.run_folders() - others
    stages = folder / "stages"
    before = {path.name: path.read_text() for path in stages.glob("*.json")}
    assert "federate.json" in before and "publish.json" not in before

    assert up(pipeline.stack)["worker"]
    again = pipeline.submit("soppu/full-pipeline")
    until(lambda: "collect" in pipeline.task_runs(again), timeout=300, every=0.05)
    kill(pipeline, "prefect-server")  # the flow waits for it, and goes on
    time.sleep(OUTAGE_S)
    assert up(pipeline.stack) == {"prefect server": True, "worker": False}
    pipeline.completed(again)
    tasks = pipeline.task_runs(again)
    for name in ("federate", "compress"):
        assert tasks[name]["state_name"] == "Cached", tasks[name]["state_name"]
        assert (stages / f"{name}.json").read_text() == before[f"{name}.json"]
    assert json.loads((stages / "publish embedded.json").read_text())["attempts"] == 1

    # a second target, at which nobody answers, keeps nothing from the first, and the run says so
    nobody = f"http://127.0.0.1:{free_port()}"
    there = {"name": "there", "url": pipeline.overrides["serve.url"]}
    gone = {"name": "gone", "url": nobody, "target": "lorax", "lorax_image": ""}
    gone["lorax_volume"] = str(pipeline.folder)
    pipeline.overrides |= {"serve.targets": [there, gone]}
    last = pipeline.submit("soppu/full-pipeline")
    ended = pipeline.wait(last)
    assert ended["state_type"] == "FAILED" and "1 of 2 targets" in ended["state"]["message"]
    (folder,) = pipeline.run_folders() - others - {folder}
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["targets"]}
    assert rows["there"]["error"] == "" and rows["there"]["users"] == 3
    assert f"{nobody}: nobody answers" in rows["gone"]["error"]
    live = Registry.open(pipeline.folder / "registry").publications()
    assert live[0].url == rows["there"]["url"] and live[0].bundle_id == rows["there"]["bundle_id"]


def kill(pipeline: Pipeline, name: str) -> None:
    """SIGKILL to a process of the stack and to everything under it, as a lost machine would."""
    first = psutil.Process(json.loads(pipeline.stack.pid_file(name).read_text())["pid"])
    doomed = [first, *first.children(recursive=True)]
    for item in doomed:
        item.kill()
    psutil.wait_procs(doomed, timeout=10)
