"""The Flower ServerApp: one run of a federation, of adapters or of cores, or a measurement on users' nodes.

This is the federation's server. The HTTP server that answers prompts is `soppu.serve`.

Run configuration: `config`, a frozen SOPPU configuration (TOML), `workdir`, the work folder of the run, and
`task`, what is to be done.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.basis_federation import BasisFederation
from server.core_federation import CoreFederation
from server.delivery import Delivery
from server.federation import Federation
from soppu import config as configuration
from soppu import files
from soppu.config import Config
from soppu.errors import FederationError
from soppu.federation import members
from soppu.federation.simulation import EVALUATE, FEDERATE, LEARN

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point Flower calls."""
    config = configuration.load(str(context.run_config["config"]))
    workdir, remote = Path(str(context.run_config["workdir"])), config.federation.connection
    nodes = members.read(config.federation.members) if remote else None
    kind, measures = _kind(str(context.run_config["task"]), config)
    with files.exclusive(workdir / "serverapp.lock"):  # one that was told to stop may still be at it
        federation = kind(config, workdir, members=nodes)
        task = federation.measure if measures else federation.run
        task(Delivery(grid, grace_s=federation.patience_s, heard=federation.heard))


def _kind(task: str, config: Config) -> tuple[type[Federation], bool]:
    """Which federation a task is of, and whether it measures what there is. FederationError: no such task."""
    if task not in (FEDERATE, LEARN, EVALUATE):
        raise FederationError(f"task = {task!r}, allowed: {FEDERATE}, {LEARN}, {EVALUATE}")
    if task == LEARN:
        return BasisFederation, False
    of_cores = task == FEDERATE and config.federation.form != "lora"
    return CoreFederation if of_cores else Federation, task == EVALUATE
