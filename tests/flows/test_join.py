"""A new user joins by a deployment, on a real worker, what a real flow run has published."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from soppu.progress.followed import Followed
from soppu.stages.run import open_run
from tests.flows.driver import Pipeline

pytestmark = [pytest.mark.slow, pytest.mark.long]


@dataclass
class Joining(Pipeline):
    """A pipeline whose flow runs get other parameters."""

    given: dict[str, Any] | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What the flow of a join is started with."""
        return self.given or super().parameters


def test_a_deployment_joins_a_user_and_a_second_run_of_it_finds_them_served(tiny_pipeline: Pipeline) -> None:
    gate = {"gate.max_loss_over_shared": 10.0, "compress.method": "joint", "compress.rank": 8}
    made = {**tiny_pipeline.overrides, **gate, "compress.ratio": 0.0, "federation.personal_steps": 30}
    pipeline = replace(tiny_pipeline, overrides=made)
    pipeline.completed(pipeline.start("soppu/full-pipeline"))
    run = open_run(str(pipeline.run_folder()))
    lines = [{"prompt": f"say {n}: ", "completion": f"dora sings {n} " * 3} for n in range(20)]
    text = pipeline.folder / "dora.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    given = {"user": "dora", "data": str(text), "run": str(run.folder)}
    joining = Joining(pipeline.stack, pipeline.folder, {}, given)
    for _ in range(2):
        joining.completed(joining.submit("soppu-join/join"))
        seen = Followed(run.folder).look()
        assert seen.ended == "done" and seen.stages["join dora"].state == "done"
    registry = run.registry()
    live = registry.live(run.config.serve.url)
    assert "dora" in registry.get_set(registry.bundle(live).set_id)
    assert registry.bundle(live).run == run.id and run.read("stages/join dora.json")["attempts"] == 1
