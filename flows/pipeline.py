"""Flow `soppu`: from users' text to served tokens. Its deployment is `full-pipeline`."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.recompress import recompress
from tasks.basis import basis, cohort_wanted, federate_cohort
from tasks.collect import collect
from tasks.federate import federate
from tasks.join import collect as collect_joins
from tasks.outage import outlasting
from tasks.prepare import prepare
from tasks.recording import ending


@flow(name="soppu", log_prints=True)
def full_pipeline(config: str = "configs/default.toml", overrides: dict[str, Any] | None = None) -> str:
    """Train every user's adapter or core where their text is, then compress, evaluate and publish them all.

    Args:
        config: configuration file, relative to the repository or absolute.
        overrides: `{"section.key": value}`, stronger than the file.
    """
    run = prepare(config, overrides)
    with ending(run):
        if cohort_wanted(run):
            basis(run, federate_cohort(run))
        federation = federate(run)
        collect_joins(run)
        set_id = collect(run, federation)
        return outlasting(recompress, run=run, set_id=set_id)
