"""How `soppu run` and `soppu watch` show a run until it ends, or until they are told to stop."""

from __future__ import annotations

import sys
import time
from typing import Protocol

import click
from rich.console import Console
from rich.live import Live

from soppu.commands.listening import Told
from soppu.progress.events import DONE
from soppu.progress.followed import Followed
from soppu.progress.lines import duration
from soppu.progress.picture import Picture
from soppu.progress.screen import screen

_LOOK_S = 0.2


class Source(Protocol):
    """Where a run is seen."""

    def look(self) -> Followed | None:
        """What follows its folder, once that is known."""
        ...

    def over(self) -> tuple[str, str]:
        """Whether it has ended, "done" or "failed" and why, whatever the folder says; else empty strings."""
        ...

    def waiting(self) -> str:
        """What to say of it as long as its folder says nothing."""
        ...


def show(source: Source, told: Told, *, title: str) -> Picture:
    """Show a run until it ends, its process dies, or a signal comes; gives the last of it."""
    out = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    shown = _Screen(out, title) if out.is_terminal else _Plain()
    with shown:
        while True:
            (over, why), followed = source.over(), source.look()
            found = followed.look() if followed else Picture()
            if over and not found.ended:
                found.ended, found.error = over, why
            lines = followed.lines if followed and found.began else [source.waiting()]
            shown.show(found, lines)
            if found.ended or told.number:
                return found
            time.sleep(_LOOK_S)


def finish(found: Picture, told: Told, *, left: str) -> None:
    """End the command as the run has ended.

    Args:
        left: what to say of a run that goes on without us.

    Raises:
        click.ClickException: the run has failed; names the error.
        click.exceptions.Exit: 0, or 130 after Ctrl-C.
    """
    if told.number:
        click.echo(f"left; the run has ended: {found.ended}" if found.ended else left)
        raise click.exceptions.Exit(told.exit_code)
    if found.ended == DONE:
        raise click.exceptions.Exit(0)
    raise click.ClickException(f"the run has failed: {found.error}")


class _Plain:
    """Without a terminal: every line once, as it comes."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._said = 0

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, found: Picture, lines: list[str]) -> None:
        if lines[: self._said] != self._lines[: self._said]:  # another run has begun in the folder
            self._said = 0
        self._lines = list(lines)
        for line in lines[self._said :]:
            click.echo(line)
        self._said = len(lines)
        sys.stdout.flush()


class _Screen:
    """On a terminal: one screen, drawn again in this thread, so that nothing draws while we leave."""

    def __init__(self, out: Console, title: str) -> None:
        self._out, self._title, self._ended = out, title, ""
        self._live = Live(console=out, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> _Screen:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)
        if self._ended:
            self._out.print(self._ended)

    def show(self, found: Picture, lines: list[str]) -> None:
        title = self._title if found.began else f"{self._title}\n{lines[0]}"
        shown = screen(found, title=title, now=time.time(), size=self._out.size)
        self._live.update(shown, refresh=True)
        if found.ended == DONE:
            self._ended = f"run: done in {duration(found.seconds or 0)}"
