"""`soppu run` on a terminal, when the run does not go to its end by itself."""

from __future__ import annotations

import json
import re

import pytest

from deploy.stack import up
from soppu.progress.events import FILE, RUN, Reader
from tests.flows.driver import Pipeline
from tests.flows.test_killed import kill

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_left_by_ctrl_c_attached_again_and_cancelled(tiny_pipeline: Pipeline) -> None:
    pipeline, others = tiny_pipeline, tiny_pipeline.run_folders()
    pipeline.overrides |= {"federation.rounds": 30}
    shown = pipeline.run()
    try:
        shown.until("round 2 of 31", timeout=300)
        shown.key(b"\x03")
        assert shown.ended() == 130
        said = re.sub(r"\s+", " ", shown.text)
        (folder,) = pipeline.run_folders() - others
        assert f"the run goes on: soppu watch {folder}" in said
        flow_run = said.split("prefect flow-run cancel ")[1].split()[0]
        assert pipeline.api(f"flow_runs/{flow_run}")["state_type"] == "RUNNING"
    finally:
        shown.close()
    again = pipeline.watch(folder)
    try:
        again.until("round ", timeout=60)
        pipeline.prefect("flow-run", "cancel", flow_run)
        assert again.ended(timeout=120) == 1
        assert "Error: the run has failed: stopped from outside" in again.text
    finally:
        again.close()


def test_a_worker_that_is_killed_with_all_it_runs_is_told_while_prefect_still_believes_in_it(
    tiny_pipeline: Pipeline,
) -> None:
    pipeline, others = tiny_pipeline, tiny_pipeline.run_folders()
    pipeline.overrides |= {"federation.rounds": 31}
    shown = pipeline.run()
    try:
        shown.until("round 2 of 32", timeout=300)
        kill(pipeline, "worker")
        assert shown.ended(timeout=60) == 1
        (folder,) = pipeline.run_folders() - others
        (began,) = [event for event in Reader(folder / FILE).read() if event.stage == RUN]
        assert f"its process {began.pid} has died in stage federate" in re.sub(r"\s+", " ", shown.text)
        assert pipeline.api(f"flow_runs/{began.of}")["state_type"] == "RUNNING"
    finally:
        shown.close()
        assert up(pipeline.stack)["worker"]


def test_a_wrong_text_is_told_as_the_error_that_ended_it(tiny_pipeline: Pipeline) -> None:
    pipeline = tiny_pipeline
    pipeline.overrides |= {"data.source": "/nowhere/at/all"}
    shown = pipeline.run()
    try:
        assert shown.ended(timeout=120) == 1
        said = re.sub(r"\s+", " ", shown.text)
        assert "Error: the run has failed:" in said and "/nowhere/at/all" in said
    finally:
        shown.close()


def test_a_deployment_that_is_not_there_is_named(tiny_pipeline: Pipeline) -> None:
    shown = tiny_pipeline.run("--deployment", "soppu/nothing")
    try:
        assert shown.ended() == 1
        assert "has no deployment 'soppu/nothing'" in re.sub(r"\s+", " ", shown.text)
    finally:
        shown.close()


def test_without_prefect_the_same_stages_run_and_the_same_is_shown(tiny_pipeline: Pipeline) -> None:
    pipeline, others = tiny_pipeline, tiny_pipeline.run_folders()
    compared = {"evaluate.arms": ["personal"], "evaluate.metrics": ["loss"]}
    rule = {"gate.rules": ["loss of personal <= 1.5 of base"]}  # nothing is published that has not heard it
    pipeline.overrides |= {"compress.ratio": 3.5, **compared, **rule}
    shown = pipeline.run("--here")
    try:
        shown.until("publish embedded", timeout=300)
        assert shown.ended(timeout=300) == 0, shown.text
    finally:
        shown.close()
    (folder,) = pipeline.run_folders() - others
    report = json.loads((folder / "report.json").read_text())
    assert report["serving"]["canaries_ok"] is True
    assert {stage["name"] for stage in report["stages"]} >= {
        "prepare",
        "federate",
        "tradeoff",
        "publish embedded",
    }
    events = Reader(folder / FILE).read()
    assert [event.state for event in events if event.stage == RUN] == ["began", "done"]
    assert events[0].stages.count("tradeoff") == 1 and any(event.stage == "tradeoff" for event in events)
