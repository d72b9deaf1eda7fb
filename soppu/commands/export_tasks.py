"""`soppu export-tasks`: held-out text for lm-eval, and the commands that measure it there."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from soppu import tables
from soppu.evaluate.tradeoff import lm_eval
from soppu.stages.export_tasks import Exported
from soppu.stages.export_tasks import export_tasks as export


@click.command("export-tasks")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def export_tasks_command(run_dir: Path, folder: Path) -> None:
    """Write the held-out text of RUN_DIR as tasks of EleutherAI's lm-eval, into DIR.

    A task for every user, users' own adapters as PEFT folders, and the losses that this run measured; prints
    them, and the commands that have lm-eval measure the same. DIR has to be empty or absent.
    """
    found = export(str(run_dir), folder)
    rows = [(user, task, *_losses(found, user)) for user, task in found.tasks.items()]
    heads = ("USER", "TASK", "BASE", "PERSONAL")
    click.echo(tables.render(heads, rows, right=(2, 3), width=tables.terminal_width()))
    click.echo(f"\n{lm_eval.METRIC} by lm-eval, of the base model, and of a user with their adapter:\n")
    click.echo(shlex.join(lm_eval.command(folder, list(found.tasks.values()), model=found.model)))
    for user, adapter in list(found.adapters.items())[:1]:
        words = lm_eval.command(folder, [found.tasks[user]], model=found.model, adapter=adapter)
        click.echo(shlex.join(words))


def _losses(found: Exported, user: str) -> tuple[str, str]:
    """Base and personal; "-" where this run measured nothing."""
    ours = found.ours.get(user, {})
    base, personal = (f"{ours[name]:.4f}" if name in ours else "-" for name in ("base", "personal"))
    return base, personal
