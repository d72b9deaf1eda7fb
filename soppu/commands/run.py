"""`soppu run`: start the pipeline, and show it until it ends."""

from __future__ import annotations

from pathlib import Path

import click

from soppu import config as configuration
from soppu.commands.flow_run import FlowRun, submit
from soppu.commands.following import finish, show
from soppu.commands.listening import Told
from soppu.commands.options import key_values
from soppu.commands.run_here import HereRun


@click.command("run")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    default=Path("configs/demo.toml"),
    show_default=True,
    help="The TOML file that says what is run.",
)
@click.option("--set", "given", multiple=True, metavar="KEY=VALUE", help="A key of it; repeatable.")
@click.option("--deployment", default="soppu/full-pipeline", show_default=True, help="Which flow is run.")
@click.option(
    "--api",
    envvar="PREFECT_API_URL",
    default="http://127.0.0.1:4200/api",
    show_default=True,
    help="Prefect's API; also PREFECT_API_URL.",
)
@click.option("--here", is_flag=True, help="Without Prefect, in one process: nothing is retried.")
@click.pass_obj
def run_command(
    told: Told, /, path: Path, given: tuple[str, ...], deployment: str, api: str, here: bool
) -> None:
    """Start the pipeline on the Prefect server that is up, and show how far it is until it ends.

    It ends with 0 when the run has, or with 1 and the error that ended the run. Ctrl-C leaves it, with 130:
    the run goes on, `soppu watch` shows it again, and what it says as it leaves ends it. Without a terminal
    one line a stage is printed, and one a round.

    \b
      soppu run --config configs/mine.toml --set compress.ratio=32
    """  # noqa: D301
    overrides = key_values(given)
    config = configuration.load(path, overrides)  # what is wrong with it is told here, and nothing is started
    if told.number:
        raise click.exceptions.Exit(told.exit_code)
    run: HereRun | FlowRun
    if here:
        run = HereRun(path.resolve(), overrides, runs=Path(config.runs))
        title, end = f"{path.name}, process {run.pid}", f"kill {run.pid}"
    else:
        parameters = {"config": str(path.resolve()), "overrides": overrides}
        run = submit(api.rstrip("/"), deployment, parameters)
        title, end = f"{deployment} {path.name}, flow run {run.name}", f"prefect flow-run cancel {run.id}"
    found = show(run, told, title=title)
    where = f"soppu watch {run.folder}" if run.folder else "soppu watch"
    finish(found, told, left=f"left; the run goes on: {where} shows it again, {end} ends it")
