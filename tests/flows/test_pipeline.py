"""The whole pipeline as a user starts it: a real worker, a real simulation, a real server."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import requests

from deploy.stack import up
from soppu.federation.simulation import end_processes, mark_of
from soppu.registry import Registry
from tests.flows.driver import Pipeline, until

pytestmark = pytest.mark.slow


def completed(pipeline: Pipeline, flow_run: str) -> None:
    ended = pipeline.wait(flow_run)
    assert ended["state_type"] == "COMPLETED", pipeline.logs(flow_run)


def test_from_text_to_served_tokens(pipeline: Pipeline) -> None:
    flow_run = pipeline.start("soppu/full-pipeline")
    completed(pipeline, flow_run)
    folder = pipeline.run_folder()
    report = json.loads((folder / "report.json").read_text())
    users = {row["id"]: row for row in report["users"]}
    assert set(users) == {"email", "tkinter", "xml"}
    registry = Registry.open(pipeline.folder / "registry")
    assert registry.current_set() == {name: row["adapter_id"] for name, row in users.items()}
    assert report["federation"]["bytes_up"] > 0 < report["federation"]["bytes_down"]
    compression = report["compression"]
    assert compression["bytes_after"] == registry.bundle_bytes(report["serving"]["bundle_id"])
    assert compression["bytes_before"] == sum(
        registry.adapter_bytes(row["adapter_id"]) for row in users.values()
    )
    assert report["serving"]["canaries_ok"] is True
    assert {stage["name"] for stage in report["stages"]} >= {
        "federate",
        "compress",
        "evaluate",
        "publish embedded",
    }
    assert "<svg" in (folder / "report.html").read_text()
    body = {"inputs": "def close(self):", "parameters": {"adapter_id": "email", "max_new_tokens": 4}}
    answer = requests.post(f"{report['serving']['url']}/generate", json=body, timeout=60)
    assert answer.status_code == 200 and answer.headers["x-adapter-id"] == "email"
    artifacts = pipeline.api("artifacts/filter", {})
    assert {item["key"] for item in artifacts} >= {
        "soppu-users",
        "soppu-compression",
        "soppu-report",
        "soppu-federation",
    }

    nightly = pipeline.start("soppu-recompress/nightly")
    completed(pipeline, nightly)
    assert registry.publications()[0].bundle_id == report["serving"]["bundle_id"]


def test_a_killed_simulation_is_retried_to_the_same_number_of_adapters(
    tiny_pipeline: Pipeline,
) -> None:
    pipeline = tiny_pipeline
    flow_run = pipeline.submit("soppu/full-pipeline")
    runs = pipeline.folder / "runs"

    def in_the_rounds() -> Path | None:
        for progress in runs.glob("*/federation/progress.json"):
            if "round 2" in json.loads(progress.read_text())["note"]:
                return progress.parent
        return None

    federation = until(in_the_rounds, timeout=240, every=0.05)
    assert end_processes(mark_of(federation)) > 0
    completed(pipeline, flow_run)
    attempts = json.loads((federation.parent / "stages" / "federate.json").read_text())["attempts"]
    assert attempts >= 2
    registry = Registry.open(pipeline.folder / "registry")
    assert set(registry.current_set()) == {"ann", "bob", "cleo"}


def test_a_killed_worker_costs_no_finished_stage(tiny_pipeline: Pipeline) -> None:
    pipeline, others = tiny_pipeline, tiny_pipeline.run_folders()
    pipeline.overrides |= {"compress.ratio": 3.0}  # a run of its own, of the training there is
    first = pipeline.submit("soppu/full-pipeline")

    def compressed() -> bool:
        tasks = pipeline.task_runs(first)
        return "compress" in tasks and tasks["compress"]["state_type"] == "COMPLETED"

    until(compressed, timeout=300, every=0.1)
    kill_worker(pipeline)
    (folder,) = pipeline.run_folders() - others
    stages = folder / "stages"
    before = {path.name: path.read_text() for path in stages.glob("*.json")}
    assert "federate.json" in before and "publish.json" not in before

    assert up(pipeline.stack)["worker"]
    again = pipeline.submit("soppu/full-pipeline")
    completed(pipeline, again)
    tasks = pipeline.task_runs(again)
    for name in ("federate", "compress"):
        assert tasks[name]["state_name"] == "Cached", tasks[name]["state_name"]
        assert (stages / f"{name}.json").read_text() == before[f"{name}.json"]
    assert (stages / "publish.json").exists()


def kill_worker(pipeline: Pipeline) -> None:
    """SIGKILL to the worker and to everything under it, as a lost machine would."""
    pid_file = pipeline.stack.pid_file("worker")
    worker = psutil.Process(json.loads(pid_file.read_text())["pid"])
    doomed = [worker, *worker.children(recursive=True)]
    for item in doomed:
        item.kill()
    psutil.wait_procs(doomed, timeout=10)
