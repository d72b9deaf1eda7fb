"""Flow `soppu-recompress`: from a frozen set of adapters to a served bundle. Its deployment is `nightly`."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.collect import freeze_current
from tasks.compress import compress
from tasks.evaluate import evaluate
from tasks.prepare import prepare
from tasks.publish import publish
from tasks.report import report


@flow(name="soppu-recompress", log_prints=True)
def recompress(
    config: str = "configs/nightly.toml",
    overrides: dict[str, Any] | None = None,
    run: str = "",
    set_id: str = "",
) -> str:
    """Compress, evaluate, publish. On its own it takes every user's current adapter.

    Args:
        config: configuration file; not read if `run` is given.
        overrides: `{"section.key": value}`, stronger than the file.
        run: run folder of the pipeline that calls this flow.
        set_id: frozen set of that pipeline.
    """
    run = run or prepare(config, overrides, text=False)
    set_id = set_id or freeze_current(run)
    bundle_id = compress(run, set_id)
    evaluation = evaluate(run, set_id, bundle_id)
    report(run, evaluation)
    publish(run, bundle_id, evaluation)
    return report(run, evaluation)
