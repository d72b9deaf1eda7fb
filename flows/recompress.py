"""Flow `soppu-recompress`: from a frozen set of adapters to a served bundle. Its deployment is `nightly`."""

from __future__ import annotations

from typing import Any

from prefect import flow, unmapped

from soppu.errors import TargetError
from tasks.collect import freeze_current
from tasks.compress import compress
from tasks.evaluate import evaluate
from tasks.join import collect as collect_joins
from tasks.prepare import prepare
from tasks.publish import publish, target_names
from tasks.recording import ending
from tasks.refit import refit, refitted
from tasks.refit import wanted as refit_wanted
from tasks.report import report
from tasks.tradeoff import tradeoff
from tasks.tradeoff import wanted as comparison_wanted


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
    own = not run
    run = run or prepare(config, overrides, text=False)
    with ending(run, own=own):
        return _recompress(run, set_id or _everybody(run))


def _everybody(run: str) -> str:
    """Every user's current adapter; who joined at a server since the last publication is among them."""
    collect_joins(run)
    return freeze_current(run)


def _recompress(run: str, set_id: str) -> str:
    set_id = refitted(run, set_id)
    bundle_id = compress(run, set_id)
    evaluation = evaluate(run, set_id, bundle_id)
    if refit_wanted(run, evaluation):
        set_id = refit(run, set_id, evaluation)
        bundle_id = compress(run, set_id)
        evaluation = evaluate(run, set_id, bundle_id)
    if comparison_wanted(run):
        evaluation = tradeoff(run, evaluation)
    report(run, evaluation)
    names = target_names(run)
    fixed = map(unmapped, (run, bundle_id, evaluation))
    states = publish.map(*fixed, names, return_state=True)  # one that fails does not keep the others from it
    page = report(run, evaluation)
    failed = {name: state for name, state in zip(names, states, strict=True) if not state.is_completed()}
    if len(failed) == len(names) == 1:
        states[0].result()
    if failed:
        why = "; ".join(f"{name}: {state.message}" for name, state in failed.items())
        raise TargetError(f"{len(failed)} of {len(names)} targets were not published to: {why}")
    return page
