"""The whole pipeline in one process, without Prefect: no retries and no schedule, the same stages.

    python -m soppu.stages.pipeline CONFIG OVERRIDES OF

What ends it is in the run folder's progress, or, before there is a folder, on standard error. Started again,
it finds the rounds and the adapters that were finished, as a retry does.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from soppu.errors import SoppuError, TargetError
from soppu.federation.chosen_basis import COHORT
from soppu.progress import telling
from soppu.stages import basis, federate, grow, publish
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.forms import has_cohort
from soppu.stages.join_collect import collect_everywhere
from soppu.stages.published import stage_name, target_names
from soppu.stages.report import stage_names, write_report
from soppu.stages.run import open_run, prepare
from soppu.stages.tradeoff import judge


def full_pipeline(config: str, overrides: Mapping[str, Any] | None = None, *, of: str = "") -> str:
    """Train, compress, evaluate, publish; returns the run folder. Raises what its stages raise.

    Args:
        config: a TOML file.
        overrides: `{"section.key": value}`, stronger than the file.
        of: who asked for it; it is in the run's progress.
    """
    started = time.monotonic()
    run = prepare(config, overrides)
    seconds = time.monotonic() - started
    telling.begin(Path(run), stage_names(run, trains=True), of=of)
    telling.done(Path(run), "prepare", seconds=seconds)
    _note(run, "prepare", seconds)
    with telling.ending(Path(run)):
        if has_cohort(open_run(run)):
            with _noted(run, COHORT):
                cohort = federate.federate_cohort(run)
            with _noted(run, basis.STAGE):
                basis.make_basis(run, cohort)
        with _noted(run, "federate"):
            federation = federate.federate(run)
        with _noted(run, "collect"):
            collect_everywhere(run)
            set_id = federate.collect(run, federation)
        _recompress(run, set_id)
    return run


def _recompress(run: str, set_id: str) -> None:
    set_id = grow.refitted(run, set_id)
    bundle_id, evaluation = _evaluated(run, set_id)
    if grow.wanted(run, evaluation):
        with _noted(run, grow.STAGE):
            set_id = grow.refit(run, set_id, evaluation)
        bundle_id, evaluation = _evaluated(run, set_id)
    if judge.wanted(run):
        with _noted(run, "tradeoff"):
            evaluation = judge.tradeoff(run, evaluation).evaluation
    write_report(run, evaluation)
    failed: dict[str, SoppuError] = {}
    for name in (names := target_names(run)):  # one that fails does not keep the others from it
        try:
            with _noted(run, stage_name(name)):
                publish.publish(run, bundle_id, evaluation, name)
        except SoppuError as error:
            failed[name] = error
    write_report(run, evaluation)
    if len(failed) == len(names) == 1:
        raise failed.popitem()[1]
    if failed:
        why = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise TargetError(f"{len(failed)} of {len(names)} targets were not published to: {why}")


def _evaluated(run: str, set_id: str) -> tuple[str, str]:
    """The bundle of a set, and the file of its evaluation."""
    with _noted(run, "compress"):
        bundle_id = compress_set(run, set_id)
    with _noted(run, "evaluate"):
        return bundle_id, evaluate(run, set_id, bundle_id)


@contextmanager
def _noted(run: str, name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    _note(run, name, time.monotonic() - started)


def _note(run: str, name: str, seconds: float) -> None:
    """As a task does, for the report."""
    open_run(run).write(f"stages/{name}.json", {"name": name, "seconds": seconds, "attempts": 1})


def main(config: str, overrides: str, of: str) -> None:
    """Run it; an error of ours is one line, and SIGTERM is told as what ended it."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        full_pipeline(config, json.loads(overrides), of=of)
    except SoppuError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
