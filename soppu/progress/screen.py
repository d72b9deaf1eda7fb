"""A run as one screen: its stages with bars, the round, the user, time left, the last warning."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from soppu.progress.events import DONE, FAILED
from soppu.progress.lines import duration, flat
from soppu.progress.picture import AT_WORK, KEPT, WAITING, Picture, Stage

_STYLES = {AT_WORK: "bold", DONE: "green", KEPT: "green", FAILED: "bold red"}
_NARROW, _BAR = 60, 24  # columns: of a terminal that has no room for bars, and of a long bar
_QUIET_S = 60.0
_OTHER_ROWS = 6  # title, what is waited for, where it is, its note, the warning, and the cursor's


def screen(found: Picture, *, title: str, now: float, size: tuple[int, int]) -> RenderableType:
    """What is shown at the moment `now` on a terminal of a size (columns, rows). No line is ever wrapped.

    Where there are more stages than rows, those around the one at work are shown.
    """
    width, rows = size
    table = Table.grid(padding=(0, 2, 0, 0))
    narrow = width < _NARROW
    for _ in range(2 if narrow else 4):
        table.add_column(no_wrap=True, overflow="crop")
    for stage in _around(found, rows - _OTHER_ROWS):
        style = _STYLES.get(stage.state, "dim")
        name, state, beside = Text(stage.name, style), stage.state, _beside(stage, now)
        if narrow:
            table.add_row(name, Text(beside if state == AT_WORK else f"{state}  {beside}", style))
            continue
        colour = "red" if state == FAILED else "green"
        bar = ProgressBar(
            1.0, _share(stage), min(_BAR, width - 48), complete_style=colour, finished_style=colour
        )
        table.add_row(name, Text(state, style), bar, Text(beside, style))
    below = [Text(line, no_wrap=True, overflow="crop") for line in _below(found, now)]
    warning = Text(
        f"last warning: {flat(found.warning)}"[: 4 * width], "yellow", no_wrap=True, overflow="crop"
    )
    parts: list[RenderableType] = [Text(title, "bold", no_wrap=True, overflow="crop"), table, *below]
    return Group(*parts, *([warning] if found.warning else []))


def _around(found: Picture, rows: int) -> list[Stage]:
    """At most so many stages, at least one: the one at work, or the last that was begun, in the middle."""
    stages, rows = list(found.stages.values()), max(1, rows)
    begun = [place for place, stage in enumerate(stages) if stage.state not in (WAITING, KEPT)]
    middle = stages.index(found.now) if found.now else max(begun, default=0)
    first = max(0, min(middle - rows // 2, len(stages) - rows))
    return stages[first : first + rows]


def _share(stage: Stage) -> float:
    return 1.0 if stage.state in (DONE, KEPT) else stage.share


def _beside(stage: Stage, now: float) -> str:
    """How long a stage took, or how far it is."""
    again = f", attempt {stage.attempts}" if stage.attempts > 1 else ""
    if stage.state == AT_WORK:
        return f"{stage.share:4.0%}  {duration(now - stage.since)}{again}"
    return "" if stage.seconds is None else f"{duration(stage.seconds)}{again}"


def _below(found: Picture, now: float) -> list[str]:
    """Where the stage at work is."""
    stage = found.now
    if stage is None or found.ended:
        return []
    place = "" if stage.round is None else f"round {stage.round}"
    if place and stage.rounds:
        place += f" of {stage.rounds}"
    who = f"user {flat(stage.user)}" if stage.user else ""
    left = stage.left(now)
    time = "" if left is None else f"about {duration(left)} left of {stage.name}"
    quiet = now - found.last
    silent = f"nothing heard for {duration(quiet)}" if quiet > _QUIET_S else ""
    facts = "   ".join(filter(None, (place, who, time, silent)))
    return [line for line in (facts, flat(stage.note)) if line]
