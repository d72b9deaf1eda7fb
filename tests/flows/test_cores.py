"""A cohort's adapters, the basis of them, everybody's cores: one flow run, as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
import requests
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle
from soppu.compress.joining import basis_of
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


def test_a_night_grows_the_basis_that_a_probe_finds_too_narrow(tiny_pipeline: Pipeline) -> None:
    pipeline = replace(tiny_pipeline, overrides={**tiny_pipeline.overrides, **CORES})
    pipeline.completed(pipeline.start("soppu/full-pipeline"))
    registry = Registry.open(pipeline.overrides["registry.root"])
    cores = registry.current_set()
    old = registry.get_basis(registry.get_core(cores["ann"]).basis_id)
    for seed, user in enumerate(("ann", "bob")):  # who trained freely, and is a core still
        probe = elsewhere(registry.get_adapter(cores[user]), seed)
        registry.put_adapter(probe, user=user)
        registry.put_adapter(registry.get_core(cores[user]), user=user, run="again")
    settings = {"refit": "grow", "max_error": 0.1, "grow_by": 4, "min_probes": 2}
    before, told = pipeline.run_folders(), {f"basis.{name}": value for name, value in settings.items()}
    night = replace(pipeline, overrides={**pipeline.overrides, **told})
    flow_run = night.start("soppu-recompress/nightly")
    night.completed(flow_run)
    assert "refit" in night.task_runs(flow_run)
    (folder,) = night.run_folders() - before
    report = json.loads((folder / "report.json").read_text())
    assert report["basis"]["grown_from"] == old.id != report["basis"]["basis_id"]
    bundle = Bundle.load(registry.bundle_path(report["compression"]["bundle_id"]))
    wider = {name: (out + 4, inn + 4) for name, (out, inn) in old.core_shapes().items()}
    assert basis_of(bundle).core_shapes() == wider
    after, refit = registry.current_set(), json.loads((folder / "refit.json").read_text())
    anew = {user for user, core_id in after.items() if core_id != cores[user]}
    assert after.keys() == cores.keys() and anew == refit["probes"].keys() <= {"ann", "bob"}
    first = answers(report["serving"]["url"], cores)
    again = night.start("soppu-recompress/nightly")  # nobody trained freely since: nothing grows
    night.completed(again)
    assert "refit" not in night.task_runs(again) and registry.current_set() == after
    assert answers(report["serving"]["url"], cores) == first


def elsewhere(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """An adapter of the same shapes, in directions of its own."""
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(pair.A.shape, generator=draw), torch.randn(pair.B.shape, generator=draw))
        for name, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs=pairs)


def answers(url: str, users: Iterable[str]) -> list[str]:
    """What every user is answered."""
    found = []
    for user in users:
        asked = {"inputs": "say ", "parameters": {"adapter_id": user, "max_new_tokens": 6}}
        answer = requests.post(f"{url}/generate", json=asked, timeout=60)
        assert answer.status_code == 200
        found.append(str(answer.json()["generated_text"]))
    return found
