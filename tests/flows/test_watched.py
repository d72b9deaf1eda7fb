"""`soppu run` on a terminal, when the run does not go to its end by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest

from soppu.progress.events import FILE, RUN, Reader
from tests.flows.driver import Pipeline, until

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_left_by_ctrl_c_attached_again_and_killed(tiny_pipeline: Pipeline, tmp_path: Path) -> None:
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
        (began,) = [event for event in Reader(folder / FILE).read() if event.stage == RUN]
        psutil.Process(began.pid).kill()  # no worker tells Prefect at once, the folder's reader does
        assert again.ended(timeout=60) == 1
        assert f"its process {began.pid} has died in stage federate" in re.sub(r"\s+", " ", again.text)
    finally:
        again.close()
    until(lambda: pipeline.wait(flow_run)["state_type"] == "CRASHED", timeout=120)


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
    pipeline.overrides |= {"compress.ratio": 3.5}
    shown = pipeline.run("--here")
    try:
        shown.until("publish embedded", timeout=300)
        assert shown.ended(timeout=300) == 0, shown.text
    finally:
        shown.close()
    (folder,) = pipeline.run_folders() - others
    report = json.loads((folder / "report.json").read_text())
    assert report["serving"]["canaries_ok"] is True
    assert {stage["name"] for stage in report["stages"]} >= {"prepare", "federate", "publish embedded"}
    events = Reader(folder / FILE).read()
    assert [event.state for event in events if event.stage == RUN] == ["began", "done"]
