"""A run that publishes to two containers of our image: users' adapters to one, the bundle to the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from soppu.evaluate.gate import check
from soppu.federation.simulation import free_port
from soppu.stages.run import Run, open_run, prepare
from tests.docker_engine import ROOT

EVALUATION = "evaluation-none.json"


def run_of_two(folder: Path, *, base: Path, image: str, rank: int, **serve: Any) -> Run:
    """A run in `folder`, of the base model in `base`, that has passed its gate; nothing is published yet.

    Args:
        serve: more of [serve]; containers are named after `lorax_container`.
    """
    name = serve.pop("lorax_container")
    targets = [
        {
            "name": form,
            "form": form,
            "url": f"http://127.0.0.1:{free_port()}",
            "lorax_container": f"{name}-{form}",
        }
        for form in ("adapters", "bundle")
    ]
    serve |= {"lorax_image": image, "lorax_pull": "never", "lorax_gpus": "", "target": "lorax", "drain_s": 0}
    serve |= {"state": str(folder / "serve"), "lorax_volume": str(folder / "volume"), "targets": targets}
    overrides = {
        "base.model": str(base),
        "runs": str(folder / "runs"),
        "registry.root": str(folder / "registry"),
        "compress.method": "joint",
        "compress.ratio": 0.0,
        "compress.rank": rank,
        **{f"serve.{key}": value for key, value in serve.items()},
    }
    run = open_run(prepare(str(ROOT / "configs" / "default.toml"), overrides, text=False))
    unmeasured = check([], {}, run.config.gate)
    run.write(EVALUATION, {"verdict": replace(unmeasured, passed=True, reasons=()).to_dict()})
    return run
