"""What the lines of a run come to at one moment: its stages, the one at work, how long it may still take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from soppu.progress.events import BEGAN, DONE, FAILED, RUN, WARNED, Event, last_run

WAITING, AT_WORK, KEPT = "waiting", "at work", "kept"


@dataclass
class Stage:
    """One stage.

    Attributes:
        state: "waiting", "at work", "done", "failed", or "kept": what an earlier run left was taken.
        attempts: how often it was begun.
        since: when the attempt that counts began.
        first: when, and at which share, that attempt first said how far it is: one that goes on after a
            kill does not begin at 0.
    """

    name: str
    state: str = WAITING
    share: float = 0.0
    note: str = ""
    round: int | None = None
    rounds: int | None = None
    user: str | None = None
    seconds: float | None = None
    attempts: int = 0
    since: float = 0.0
    first: tuple[float, float] | None = None
    last: float = 0.0

    def left(self, now: float) -> float | None:
        """Seconds until it ends, if it goes on as it has; None while that is anybody's guess."""
        if self.state != AT_WORK or self.first is None:
            return None
        began, share = self.first
        gone, went = self.last - began, self.share - share
        if went < 0.02 or gone < 2.0:
            return None
        return max(0.0, (1.0 - self.share) * gone / went - (now - self.last))


@dataclass
class Picture:
    """A run at one moment.

    Attributes:
        began: its first line; None where there is none yet.
        ended: "done" or "failed", "" while it goes on.
        error: what ended it.
        warning: the last one.
        last: when something was last heard.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    began: Event | None = None
    ended: str = ""
    error: str = ""
    warning: str = ""
    seconds: float | None = None
    last: float = 0.0

    @property
    def now(self) -> Stage | None:
        """The stage at work; of several, the one that began last."""
        at_work = [stage for stage in self.stages.values() if stage.state == AT_WORK]
        return max(at_work, key=lambda stage: stage.since, default=None)

    def add(self, event: Event) -> None:
        """What one more line of the same run says."""
        self.last = event.at
        if event.state == WARNED:
            self.warning = f"{event.stage}: {event.note}"
        elif event.stage == RUN:
            _of_run(self, event)
        else:
            _of_stage(self, event)


def picture(events: Sequence[Event]) -> Picture:
    """The run that began last in these lines. O(lines)."""
    found = Picture()
    for event in last_run(events):
        found.add(event)
    return found


def _of_run(found: Picture, event: Event) -> None:
    if event.state == BEGAN:
        found.began = event
        found.stages = {name: Stage(name) for name in event.stages}
    else:
        found.ended, found.error, found.seconds = event.state, event.note, event.seconds


def _of_stage(found: Picture, event: Event) -> None:
    stage = found.stages.setdefault(event.stage, Stage(event.stage))
    if event.state == BEGAN:
        attempts = stage.attempts + 1
        stage = found.stages[event.stage] = Stage(event.stage, AT_WORK, attempts=attempts, since=event.at)
        _kept_before(found, stage)
    elif event.state in (DONE, FAILED):
        stage.state, stage.seconds = event.state, event.seconds
        if event.state == FAILED:
            stage.note = event.note
            found.warning = f"{event.stage}: {event.note}"
    else:
        stage.note, stage.round, stage.rounds, stage.user = event.note, event.round, event.rounds, event.user
        if event.share is not None:
            stage.first = stage.first or (event.at, event.share)
            stage.share, stage.last = event.share, event.at


def _kept_before(found: Picture, stage: Stage) -> None:
    """What comes before a stage that begins and was never begun itself: its result was there already."""
    for other in found.stages.values():
        if other is stage:
            return
        if other.state == WAITING:
            other.state = KEPT
