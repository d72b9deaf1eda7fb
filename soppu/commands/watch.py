"""`soppu watch`: show a run that is under way, from wherever it is."""

from __future__ import annotations

from pathlib import Path

import click

from soppu.commands.following import finish, show
from soppu.commands.listening import Told
from soppu.progress.events import FILE
from soppu.progress.followed import Followed


@click.command("watch")
@click.argument("run_dir", default="latest")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.pass_obj
def watch_command(told: Told, run_dir: str, runs: Path) -> None:
    """Show how far the run in RUN_DIR is, until it ends.

    RUN_DIR is a run folder; without it, or as `latest`, the run in --runs that was last heard of. The command
    can be started and left at any time, and as often as one likes: Ctrl-C ends it with 130, and the run goes
    on. It ends with 0 when the run has, or with 1 and the error that ended the run. Without a terminal it
    prints one line a stage and one a round.
    """
    folder = _latest(runs) if run_dir == "latest" else Path(run_dir)
    if not (folder / FILE).exists():
        raise click.ClickException(f"{folder}: no run has told anything there, it holds no {FILE}")
    found = show(_Folder(Followed(folder)), told, title=str(folder))
    finish(found, told, left=f"left; the run goes on: soppu watch {folder}")


class _Folder:
    """All that is known of a run is in its folder."""

    def __init__(self, followed: Followed) -> None:
        self._followed = followed

    def look(self) -> Followed:
        return self._followed

    def over(self) -> tuple[str, str]:
        return "", ""

    def waiting(self) -> str:
        return "no run has begun here since"


def _latest(runs: Path) -> Path:
    found = {path: path.stat().st_mtime for path in runs.glob(f"[!.]*/{FILE}")}
    real = {path: when for path, when in found.items() if not path.parent.is_symlink()}
    if not real:
        raise click.ClickException(f"{runs}: holds no run that has told anything (no */{FILE})")
    return max(real, key=lambda path: real[path]).parent
