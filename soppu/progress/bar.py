"""How far a command is that does its work itself: a bar on a terminal, elsewhere a few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from soppu.progress.lines import flat

_PARTS = 10  # lines, at most about, of one thing that goes on


@contextmanager
def bar(*, shown: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what is told `{"note", "share"}`; shows it on standard error until the block ends.

    What is before the colon of a note names a thing that goes on, digits behind it apart. Without a terminal
    a line with its share is printed when one begins, and when it has got a tenth further.
    """
    console = Console(stderr=True, quiet=not shown)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    last: tuple[str, int] = ("", 0)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as drawn:
        task = drawn.add_task("", total=1.0)

        def tell(said: dict[str, Any]) -> None:
            nonlocal last
            note, share = flat(str(said["note"])), float(said["share"])
            drawn.update(task, description=note, completed=share)
            what, colon, _ = note.partition(":")
            at = (what.rstrip(" 0123456789") if colon else what, int(_PARTS * share))
            if not console.is_terminal and at != last:
                console.print(Text(f"{share:4.0%} {note}"), soft_wrap=True)
                last = at

        yield tell
