"""A cohort's adapters, the basis of them, everybody's cores: one flow run, as a user starts it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import requests

from soppu.registry import Registry
from tests.flows.driver import Pipeline

pytestmark = [pytest.mark.slow, pytest.mark.long]
CORES = {
    "federation.form": "auto",
    "federation.cohort": 2,
    "federation.basis_rank": 4,
    "compress.method": "joint",
    "compress.ratio": 0.0,
}


def test_from_text_to_tokens_of_cores(tiny_pipeline: Pipeline) -> None:
    pipeline = replace(tiny_pipeline, overrides={**tiny_pipeline.overrides, **CORES})
    before = pipeline.run_folders()
    flow_run = pipeline.start("soppu/full-pipeline")
    pipeline.completed(flow_run)
    assert {"federate-cohort", "basis", "federate", "publish"} <= pipeline.task_runs(flow_run).keys()
    (folder,) = pipeline.run_folders() - before
    report = json.loads((folder / "report.json").read_text())
    forms = report["federation"]["forms"]
    assert {form: told["users"] for form, told in forms.items()} == {"float32": 2, "core": 1}
    assert forms["core"]["bytes_up"] < forms["float32"]["bytes_up"] / 4
    assert {row["adapter_id"][:2] for row in report["users"] if row["adapter_id"]} == {"c-"}
    registry = Registry.open(pipeline.overrides["registry.root"])
    assert set(registry.current_set().values()) == {row["adapter_id"] for row in report["users"]}
    url = report["serving"]["url"]
    for user in registry.current_set():
        asked = {"inputs": "say ", "parameters": {"adapter_id": user, "max_new_tokens": 2}}
        assert requests.post(f"{url}/generate", json=asked, timeout=60).status_code == 200

    again = pipeline.start("soppu/full-pipeline")  # finds all of it
    pipeline.completed(again)
    states = {name: run["state_name"] for name, run in pipeline.task_runs(again).items()}
    trained = {name: states[name] for name in ("federate-cohort", "basis", "federate")}
    assert trained == dict.fromkeys(trained, "Cached")
    assert pipeline.run_folders() - before == {folder}


def test_from_text_to_tokens_of_cores_in_a_basis_that_a_cohort_learnt(tiny_pipeline: Pipeline) -> None:
    learnt = {"basis_of": "learnt", "basis_modules": ["down_proj"], "basis_rounds": 2, "basis_steps": 4}
    told = {f"federation.{name}": value for name, value in learnt.items()}
    pipeline = replace(tiny_pipeline, overrides={**tiny_pipeline.overrides, **CORES, **told})
    before = pipeline.run_folders()
    pipeline.completed(pipeline.start("soppu/full-pipeline"))
    (folder,) = pipeline.run_folders() - before
    report = json.loads((folder / "report.json").read_text())
    rounds = report["federation"]["rounds_log"]
    assert [one["mode"] for one in rounds if one["mode"] != "shared"] == [
        "personal",
        "basis",
        "basis",
        "personal",
    ]
    assert all(len(one["accepted"]) == 2 for one in rounds if one["mode"] == "basis")
    assert {row["adapter_id"][:2] for row in report["users"] if row["adapter_id"]} <= {"c-"}
    url = report["serving"]["url"]
    for user in Registry.open(pipeline.overrides["registry.root"]).current_set():
        asked = {"inputs": "say ", "parameters": {"adapter_id": user, "max_new_tokens": 2}}
        assert requests.post(f"{url}/generate", json=asked, timeout=60).status_code == 200
