"""`soppu join`: a new user of a fleet that is served, from their text to their first token.
`soppu admit`: users who joined at a server itself, into the registry.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
import psutil

from soppu import config as configuration
from soppu import devices, models, tables
from soppu.commands.options import USER
from soppu.cores.core import MOST_OWN
from soppu.progress.bar import bar
from soppu.serve import admin_token as tokens
from soppu.stages import join as stage
from soppu.stages.join import Joined, Newcomer
from soppu.stages.join_collect import collect_joins
from soppu.stages.join_remote import Elsewhere, join_remote
from soppu.targets.either import serving_at

_PLACE = click.Path(path_type=Path)
_AT_A_SERVER = ("config", "shared", "state", "replace", "out")  # options that mean something with --url alone


@click.command("join")
@USER
@click.option("--data", type=_PLACE, required=True, help="The user's text; see docs/data.md.")
@click.option("--run", "run_dir", type=_PLACE, help="Folder of the fleet's run.")
@click.option("--url", default="", help="A server to join at, from a machine without the run.")
@click.option(
    "--own-rank",
    type=click.IntRange(0, MOST_OWN),
    default=0,
    show_default=True,
    help="Rank of the user's own beside the core.",
)
@click.option("--target", default="", help="Serving target of the run; default: its first.")
@click.option(
    "--waive-rules", is_flag=True, help="Let rules of gate.rules be that one user has no figure of."
)
@click.option(
    "--config",
    type=_PLACE,
    help="With --url: configuration to train with, the fleet's; default: as it stands.",
)
@click.option("--shared", type=_PLACE, help="With --url: PEFT folder of the shared adapter, to begin at.")
@click.option(
    "--state",
    type=_PLACE,
    help="With --url: folder that holds the server's admin token, unless SOPPU_ADMIN_TOKEN is set.",
)
@click.option("--replace", is_flag=True, help="With --url: take the place of the core that USER has there.")
@click.option("--out", type=_PLACE, help="With --url: where cores are kept here; default: .soppu/joined.")
def join_command(**given: Any) -> None:
    """Train USER inside the basis of a fleet that is served, and serve them.

    The basis is that of the bundle that is live at a target of the run in --run, or at the server at --url.
    Only a small core is trained, on the text in --data. A part of that text, split off as everybody's is,
    judges it: a core that is worse there than the shared adapter or the base model is refused, and nothing is
    stored. Else it becomes one row of a new bundle, in which everybody else's numbers are the same bytes, and
    that is served.

    With --url the text stays on this machine: the basis is fetched, the core is sent. `soppu admit` brings
    who joined so into the registry.

    No arms are compared for one user: of the rules in gate.rules those on the loss of base, shared, personal
    or the run's own compression are judged by USER's own losses; any other refuses the join, unless it is
    waived.
    """
    run_dir, url = given["run_dir"], given["url"]
    if bool(run_dir) == bool(url):
        raise click.UsageError("one of --run and --url is needed: the fleet's run, or a server to join at")
    if odd := [name for name in _AT_A_SERVER if given[name] and run_dir]:
        raise click.UsageError(f"--{odd[0]} goes with --url")
    newcomer = Newcomer(
        given["user"], str(given["data"]), given["own_rank"], given["target"], given["waive_rules"]
    )
    before = {"start of the command": time.time() - psutil.Process().create_time()}
    devices.use_idle_cores()  # the server that they join may be at work here
    with bar() as tell:
        if run_dir:
            with stage.as_run(str(run_dir), newcomer):
                joined = stage.join(str(run_dir), newcomer, on_progress=tell)
        else:
            joined = join_remote(newcomer, _elsewhere(url, given), on_progress=tell)
    if joined.again:
        click.echo(f"{joined.user} had joined by this text; the clock is of then")
    else:
        joined.seconds = before | joined.seconds
    _print(joined)


@click.command("admit")
@click.option("--run", "run_dir", type=_PLACE, required=True, help="Folder of a run of the fleet.")
@click.option("--target", default="", help="Serving target of the run; default: its first.")
def admit_command(run_dir: Path, target: str) -> None:
    """Take users who joined at a server itself into the registry.

    A server keeps who joined there, with `soppu join --url` or by POST /soppu/v1/join, until a registry has
    them. Their cores become their current adapters, and where the server serves them, the registry says so.
    The nightly flow does the same before it compresses.
    """
    users = collect_joins(str(run_dir), target)
    click.echo(f"{len(users)} users came into the registry{': ' if users else ''}{', '.join(users)}")


def _elsewhere(url: str, given: dict[str, Any]) -> Elsewhere:
    """Where a client joins: the server must serve the base model that the configuration names."""
    config = configuration.load(given["config"]) if given["config"] else configuration.Config()
    base = models.resolve(config.base.model, cache=Path(config.base.cache))
    file = tokens.token_file(given["state"]) if given["state"] else None
    token = os.environ.get(tokens.VARIABLE, "")
    target = serving_at(url, base_hash=base.hash, admin_token=token, token_file=file)
    out = given["out"] or Path(".soppu/joined")
    return Elsewhere(target, config, out, given["shared"], given["replace"])


def _print(joined: Joined) -> None:
    rows = [(part, f"{seconds:.2f}") for part, seconds in joined.seconds.items()]
    rows.append(("together", f"{sum(joined.seconds.values()):.2f}"))
    click.echo(tables.render(("PART", "SECONDS"), rows, right=(1,), width=tables.terminal_width()))
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in joined.losses.items())
    click.echo(f"held out     {losses} (nats a token)")
    for rule, what in joined.rules.items():
        click.echo(f"{what:<12} {rule}")
    click.echo(f"core         {joined.core_id} in {joined.basis_id}: {joined.numbers:,} numbers")
    click.echo(f"trained      {joined.steps} steps")
    click.echo(f"stored       {joined.added:,} bytes in bundle {joined.bundle_id[:12]}")
    click.echo(f"served       {joined.user} at {joined.url}, first token {joined.first_token!r}")
