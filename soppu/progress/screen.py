"""A run as one screen: its stages with bars, the round, the user, time left, the last warning."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from soppu.progress.events import DONE, FAILED
from soppu.progress.lines import duration, flat
from soppu.progress.picture import AT_WORK, KEPT, Picture, Stage

_STYLES = {AT_WORK: "bold", DONE: "green", KEPT: "green", FAILED: "bold red"}
_NARROW, _WIDE, _BAR = 44, 72, 24  # columns: without a bar, with a long one, and how long that is
_QUIET_S = 60.0


def screen(found: Picture, *, title: str, now: float, width: int) -> RenderableType:
    """What is shown at the moment `now` on a terminal of so many columns. No line is ever wrapped."""
    table = Table.grid(padding=(0, 2, 0, 0))
    bar = min(_BAR, width - _WIDE + _BAR) if width >= _NARROW else 0
    for _ in range(3 if bar <= 0 else 4):
        table.add_column(no_wrap=True, overflow="crop")
    for stage in found.stages.values():
        style = _STYLES.get(stage.state, "dim")
        cells: list[RenderableType] = [Text(stage.name, style), Text(stage.state, style)]
        if bar > 0:
            colour = "red" if stage.state == FAILED else "green"
            cells.append(ProgressBar(1.0, _share(stage), bar, complete_style=colour, finished_style=colour))
        table.add_row(*cells, Text(_beside(stage, now), style))
    below = [Text(line, no_wrap=True, overflow="crop") for line in _below(found, now)]
    warning = Text(flat(found.warning)[: 4 * width], "yellow", no_wrap=True, overflow="crop")
    parts: list[RenderableType] = [Text(title, "bold", no_wrap=True, overflow="crop"), table, *below]
    return Group(*parts, *([warning] if found.warning else []))


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
