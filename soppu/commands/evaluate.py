"""`soppu evaluate`: the arms of a run side by side, by what they cost and by what they keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from soppu import tables
from soppu.evaluate.tradeoff import schema, table
from soppu.evaluate.tradeoff.page import write_page
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
    "--metric", "metrics", multiple=True, metavar="METRIC", help=f"{', '.join(METRICS)}; repeatable."
)
@click.option("--prompts", type=int, help="Prompts of every user, at most.")
@click.option("--max-new-tokens", type=int, help="Of one answer.")
@click.option("--batch", type=int, help="Prompts answered together.")
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
    with _shown() as tell:
        path = compare(str(run_dir), options=options, how=Measuring(tell))
    found = schema.read(path)
    click.echo(table.text(found, users=users, width=tables.terminal_width()))
    click.echo(f"\nwritten to {path}; to look at: {write_page(run_dir)}")


@contextmanager
def _shown() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar of what is going on, on a terminal; elsewhere a line for each thing begun."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    begun: list[str] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def tell(said: dict[str, Any]) -> None:
            note = str(said["note"])
            bar.update(task, description=note, completed=float(said["share"]))
            what, colon, _ = note.partition(":")
            what = what.rstrip(" 0123456789") if colon else what  # passes have numbers, and arms
            if not console.is_terminal and what not in begun:
                begun.append(what)
                click.echo(what, err=True)

        yield tell
