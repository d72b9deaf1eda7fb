"""`soppu evaluate`: the arms of a run side by side, by what they cost and by what they keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from soppu import tables
from soppu.evaluate.tradeoff import schema, table
from soppu.evaluate.tradeoff.page import write_page
from soppu.progress.bar import bar
from soppu.settings import build
from soppu.stages.run import open_run
from soppu.stages.tradeoff.run import Measuring, compare
from soppu.tradeoff_settings import METRICS, EvaluateConfig


@click.command("evaluate")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="ARM",
    help="base, shared, personal, centralised or METHOD@RATIO; repeatable. Default: all that the run has.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="METRIC",
    help=f"{', '.join(METRICS)}; repeatable. Default: all but pass_at_1, which runs what a model wrote.",
)
@click.option("--prompts", type=int, help="Prompts of every user, at most.")
@click.option("--max-new-tokens", type=int, help="Of one answer.")
@click.option("--batch", type=int, help="Prompts answered together.")
@click.option("--problems", type=int, help="Of HumanEval, the first ones, for pass_at_1. Default: all 164.")
@click.option("--users", is_flag=True, help="Also print every user with every arm.")
def evaluate_command(run_dir: Path, users: bool, **given: Any) -> None:
    """Compare ways to serve the users of RUN_DIR: held-out loss, text, latency, memory, bytes.

    Every arm answers the same prompts, the beginnings of users' held-out text, with the server's own engine.
    METHOD@RATIO is the run's frozen set of adapters, compressed as the run would with that method and ratio.

    What was measured is kept in RUN_DIR: a call that was stopped goes on where it was, one with another arm
    measures that arm alone. The result is tradeoff.json there; docs/evaluate.md says what is in it.

    \b
      soppu evaluate runs/latest --arm personal --arm residual@16 --arm joint@16
      soppu evaluate runs/latest --metric loss --users
    """  # noqa: D301
    run = open_run(str(run_dir))
    values = {name: value for name, value in given.items() if value not in (None, ())}
    options = build(EvaluateConfig, dataclasses.asdict(run.config.evaluate) | values, source="soppu evaluate")
    with bar() as tell:
        path = compare(str(run_dir), options=options, how=Measuring(tell))
    found = schema.read(path)
    click.echo(table.text(found, users=users, width=tables.terminal_width()))
    click.echo(f"\nwritten to {path}; to look at: {write_page(run_dir)}")
