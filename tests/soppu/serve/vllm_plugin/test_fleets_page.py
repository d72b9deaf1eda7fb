"""The examples of docs/fleets.md are of the form they say, and name what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

from soppu.serve.vllm_plugin import settings

PAGE = (Path(__file__).parents[4] / "docs" / "fleets.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_example_reads_and_names_variables_that_there_are() -> None:
    known = set(re.findall(r"SOPPU_[A-Z_]+", Path(settings.__file__).read_text()))
    assert set(re.findall(r"SOPPU_[A-Z_]+", PAGE)) <= known
    common, stack, picker = map(yaml.safe_load, blocks("yaml"))
    assert common["readinessProbe"]["httpGet"]["path"] == "/soppu/v1/health"
    model = stack["servingEngineSpec"]["modelSpec"][0]
    given = {one["name"]: one["value"] for one in model["env"]}
    read = settings.read(given)
    assert read.follow == read.registry == "s3://bucket/registry" and read.models_limit == 50_000
    used = {one["pluginRef"] for profile in picker["schedulingProfiles"] for one in profile["plugins"]}
    assert used < {one["type"] for one in picker["plugins"]} and "lora-affinity-scorer" not in used
    (example,) = blocks("python")
    assert "_maybe_resolve_lora_from_multiplex" in {
        node.name for node in ast.walk(ast.parse(example)) if isinstance(node, ast.AsyncFunctionDef)
    }
