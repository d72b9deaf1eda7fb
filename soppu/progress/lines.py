"""A run as lines of text: one a stage, one a round, one a warning. What a log holds, and a pipe is given."""

from __future__ import annotations

import re
from collections.abc import Iterable

from soppu.progress.events import BEGAN, DONE, FAILED, GOING, RUN, WARNED, Event

_SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?", re.S)


class Lines:
    """Makes lines of events, one event after the other."""

    def __init__(self) -> None:
        self._round: int | None = None
        self._begun: dict[str, int] = {}
        self._note = ""

    def of(self, event: Event) -> list[str]:
        """The lines that this event adds: none, if it says only how far a stage is."""
        stage, note = event.stage, flat(event.note.split("\n")[0])
        if event.state == BEGAN:
            return self._began(event)
        if event.state == WARNED:
            return [f"{stage}: warning: {note}"]
        if event.state == GOING:
            return self._going(event, note)
        took = "" if event.seconds is None else duration(event.seconds)
        if event.state == FAILED:
            return [f"{stage}: failed after {took}: {note}"]
        if event.state == DONE:
            last = f": {self._note}" if self._note and stage != RUN and self._round is None else ""
            return [f"{stage}: done in {took}{last}"]
        return []

    def _began(self, event: Event) -> list[str]:
        self._round, self._note = None, ""
        if event.stage == RUN:
            self._begun = {}
            return [f"run: {', '.join(event.stages)}"]
        times = self._begun[event.stage] = self._begun.get(event.stage, 0) + 1
        return [f"{event.stage}: begins again"] if times > 1 else []

    def _going(self, event: Event, note: str) -> list[str]:
        self._note = note
        if event.round is None or event.round == self._round:
            return []
        self._round = event.round
        return [f"{event.stage}: {note}"]


def lines(events: Iterable[Event]) -> list[str]:
    """All lines of a run. Those of the first events are the first of those of more: lines are only added."""
    made = Lines()
    return [line for event in events for line in made.of(event)]


def flat(text: str) -> str:
    """Text as one line without anything in it that a terminal would obey."""
    plain = _SEQUENCE.sub("", text)
    return " ".join("".join(one if one.isprintable() else " " for one in plain).split())


def duration(seconds: float) -> str:
    """Seconds as people say them: `8 s`, `4:05`, `1:02:03`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
