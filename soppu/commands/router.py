"""`soppu router`: fit a router on a finished run, and look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from soppu import tables
from soppu.commands.until_told import log_to_stderr
from soppu.progress.bar import bar
from soppu.serve.router import file as files
from soppu.serve.router.file import RouterFile
from soppu.stages import router
from soppu.stages.router import FitOptions


@click.group("router")
def router_command() -> None:
    """Fit, and show, what decides whether the base model or the user's adapter answers a request."""


@router_command.command("fit")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: RUN_DIR/router.json]"
)
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=FitOptions.prompts,
    show_default=True,
    help="Of each user, at most; text that was not trained on.",
)
@click.option(
    "--neighbours",
    type=click.IntRange(1),
    default=FitOptions.neighbours,
    show_default=True,
    help="Measured prompts that the policy of that name looks at.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=FitOptions.tolerance,
    show_default=True,
    help="Nats a token that a cheaper arm may be expected to be worse.",
)
@click.option("--policy", default="", help="Use this one, whatever cross-validation says.")
@click.option(
    "--cheaper",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another bundle of the same users as a third arm; the server has to hold it too.",
)
def fit_command(run_dir: Path, out: Path | None, **given: Any) -> None:
    """Measure every arm on prompts of RUN_DIR's users, judge every policy, and write the router.

    Prompts are held-out and validation text. A policy is judged on prompts that it was not fitted on.
    """
    log_to_stderr()
    path = out or run_dir / router.FILE
    with bar() as tell:
        found = router.fit(str(run_dir), path, FitOptions(**given), on_progress=tell)
    click.echo(f"{path}: {found.id}")
    click.echo(_text(found))


@router_command.command("show")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def show_command(file: Path) -> None:
    """Check the router FILE, and print what it was made for and how its policies were judged."""
    click.echo(_text(files.read(file)))


def _text(found: RouterFile) -> str:
    arms = ", ".join(f"{arm.name} ({arm.bytes:,.0f} bytes)" for arm in found.options.arms)
    users = len(set(found.measured.asked.users))
    head = [
        f"base model  {found.base_name} {found.base_hash[:12]}",
        f"bundle      {found.bundle_id[:12]}, run {found.run}",
        f"arms        {arms}",
        f"measured    {len(found.measured)} prompts of {users} users; gains from {found.prior_from}",
        f"policy      {found.policy}: {found.why}",
        "",
    ]
    return "\n".join([*head, _table(found)])


def _table(found: RouterFile) -> str:
    names = ["policy", "nats/token", "bytes", "base", "over the oracle", "over always personal"]
    rows = [
        [
            row["policy"],
            f"{row['quality']:.4f}",
            f"{row['bytes']:,.0f}",
            f"{100 * row['arms']['base']:.0f} %",
            _regret(row["regret_oracle"], row["interval"]),
            _regret(row["regret_personal"], row["interval_personal"]),
        ]
        for row in found.table
    ]
    return tables.render(names, rows, right=range(1, 4), rule=True)


def _regret(mean: float, ends: list[float | None]) -> str:
    low, high = ends
    return f"{mean:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low is not None and high is not None else "")
