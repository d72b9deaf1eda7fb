"""Compressing, evaluating and publishing to a real vLLM server, which the first publication starts."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from soppu.cli import main
from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.stages.publish import publish
from soppu.stages.report import write_report
from soppu.stages.run import Run
from soppu.stages.targets import open_target
from soppu.targets.vllm import VllmTarget
from tests.soppu.serve.vllm_plugin import live
from tests.soppu.stages.conftest import without_effect
from tests.soppu.stages.test_stages import WAVE_THROUGH, evaluated

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

MEMORY = ("--kv-cache-memory-bytes", "1G", "--max-model-len", "1024")


@pytest.fixture
def overrides() -> dict[str, object]:
    """The base model that vLLM can run, a vLLM server, and the default method: users keep own numbers."""
    live.require()
    return {
        "base.model": "smollm2-135m",
        "base.cache": str(live.ROOT / ".soppu" / "models"),
        "compress.method": "residual",
        "compress.ratio": 8.0,
        "serve.target": "vllm",
        "serve.vllm_python": str(live.PYTHON),
        "serve.vllm_options": list(MEMORY),
    }


def test_publications_to_a_vllm_server_are_tried_switched_and_rolled_back(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(gate=WAVE_THROUGH)
    with pytest.raises(TargetError, match="a vLLM server is started by a publication"):
        open_target(run)
    first, name = evaluated(run)
    assert publish(str(run.folder), first, name) == run.config.serve.url
    target = open_target(run)
    assert isinstance(target, VllmTarget) and target.active() == first

    report = json.loads((write_report(str(run.folder), name).html.parent / "report.json").read_text())
    assert set(report["serving"]["completions"]) == set(trained) == set(report["serving"]["canaries"])

    broken = without_effect(run, first)
    with pytest.raises(TargetError, match=r"canaries failed: bob: .*no effect"):
        publish(str(run.folder), broken, name)
    assert target.active() == first and target.bundles() == (first,)

    assert any(part.own.any() for part in Bundle.load(run.registry().bundle_path(first)).components(0))
    run = reconfigured(compress={"method": "joint", "ratio": 0.0, "rank": 6})
    second, name = evaluated(run)
    publish(str(run.folder), second, name)
    assert target.active() == second and set(target.bundles()) == {first, second}

    where = ["--url", run.config.serve.url, "--registry", run.config.registry.root]
    where += ["--state", run.config.serve.state]
    result = CliRunner().invoke(main, ["rollback", *where])
    assert result.exit_code == 0, result.output
    assert target.active() == run.registry().publications()[0].bundle_id == first
