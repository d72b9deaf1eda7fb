"""`soppu join`: a new user of a fleet that is served, from their text to their first token."""

from __future__ import annotations

from pathlib import Path

import click

from soppu import tables
from soppu.commands.options import USER
from soppu.cores.core import MOST_OWN
from soppu.progress.bar import bar
from soppu.stages import join as stage
from soppu.stages.join import Joined, Newcomer


@click.command("join")
@USER
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="The user's text; see docs/data.md."
)
@click.option(
    "--run", "run_dir", type=click.Path(path_type=Path), required=True, help="Folder of the fleet's run."
)
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
def join_command(
    user: str, *, data: Path, run_dir: Path, own_rank: int, target: str, waive_rules: bool
) -> None:
    """Train USER inside the basis of a fleet that is served, and serve them.

    The basis is that of the bundle that the run serves. Only a small core is trained, on the text in --data.
    A part of that text, split off as everybody's is, judges it: a core that is worse there than the shared
    adapter or the base model is refused, and nothing is stored. Else it becomes one row of a new bundle, in
    which everybody else's numbers are the same bytes, and that is published.

    No arms are compared for one user: of the rules in gate.rules those on the loss of base, shared, personal
    or the run's own compression are judged by USER's own losses; any other refuses the join, unless it is
    waived.
    """
    newcomer = Newcomer(user, str(data), own_rank, target, waive_rules)
    with bar() as tell:
        joined = stage.join(str(run_dir), newcomer, on_progress=tell)
    _print(joined)


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
