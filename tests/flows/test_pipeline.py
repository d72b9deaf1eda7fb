"""The whole pipeline as a user starts it: a real worker, a real simulation, a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from soppu.evaluate.tradeoff import schema
from soppu.progress.events import FILE, Reader
from soppu.registry import Registry
from tests.flows.driver import Pipeline

SOPPU = Path(sys.executable).parent / "soppu"
pytestmark = pytest.mark.slow


def test_from_text_to_served_tokens(pipeline: Pipeline) -> None:
    rule = "loss of personal <= 1.5 of base"
    compared = {"evaluate.arms": ["personal"], "evaluate.metrics": ["loss"], "gate.rules": [rule]}
    pipeline = replace(pipeline, overrides={**pipeline.overrides, **compared})
    shown = pipeline.run()
    try:
        shown.until("federate", timeout=300)  # the folder is known by then
        folder = pipeline.run_folder()
        beside = subprocess.Popen([SOPPU, "watch", folder], stdout=subprocess.PIPE, text=True)
        shown.until("round ", timeout=300)
        assert shown.ended(timeout=600) == 0, shown.text
    finally:
        shown.close()
    said, _ = beside.communicate(timeout=60)
    assert beside.returncode == 0
    logged = pipeline.logs(Reader(folder / FILE).read()[0].of)
    for stage in ("prepare", "federate", "collect", "compress", "evaluate", "report", "publish embedded"):
        assert f"{stage}: done in" in said and stage in shown.text
        assert (
            stage in ("compress", "evaluate", "report", "publish embedded") or f"{stage}: done in" in logged
        )
    assert "user " in shown.text and "run: done in" in shown.text
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
