"""The whole pipeline as a user starts it: a real worker, a real simulation, a real server."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import requests

from soppu.evaluate.tradeoff import schema
from soppu.registry import Registry
from tests.flows.driver import Pipeline

pytestmark = pytest.mark.slow


def test_from_text_to_served_tokens(pipeline: Pipeline) -> None:
    rule = "loss of personal <= 1.5 of base"
    compared = {"evaluate.arms": ["personal"], "evaluate.metrics": ["loss"], "gate.rules": [rule]}
    flow_run = replace(pipeline, overrides={**pipeline.overrides, **compared}).start("soppu/full-pipeline")
    pipeline.completed(flow_run)
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
        "tradeoff",
        "publish embedded",
    }
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "<h2>Arms</h2>" in page
    assert [arm.name for arm in schema.read(folder / "tradeoff.json").arms] == ["base", "personal"]
    body = {"inputs": "def close(self):", "parameters": {"adapter_id": "email", "max_new_tokens": 4}}
    answer = requests.post(f"{report['serving']['url']}/generate", json=body, timeout=60)
    assert answer.status_code == 200 and answer.headers["x-adapter-id"] == "email"
    artifacts = pipeline.api("artifacts/filter", {})
    assert {item["key"] for item in artifacts} >= {
        "soppu-users",
        "soppu-compression",
        "soppu-report",
        "soppu-federation",
        "soppu-tradeoff",
        "soppu-tradeoff-plot",
    }

    nightly = pipeline.start("soppu-recompress/nightly")
    pipeline.completed(nightly)
    assert registry.publications()[0].bundle_id == report["serving"]["bundle_id"]
