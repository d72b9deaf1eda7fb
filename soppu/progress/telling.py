"""How a stage says how far it is: into the run's folder, to the log, and to whoever else listens.

What cannot be written down ends no work: it is logged, and the stage goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soppu.progress import events
from soppu.progress.events import BEGAN, DONE, FAILED, GOING, RUN, WARNED, Event
from soppu.progress.lines import Lines

Tell = Callable[[dict[str, Any]], None]
EVERY_S = 0.25  # between two lines that say only how far it is
_SAID = ("note", "share", "round", "rounds", "user", "warning")
_log = logging.getLogger("soppu.progress")
_OURS = "soppu"


def begin(folder: Path, stages: Sequence[str], *, of: str = "") -> None:
    """Say that a run begins, in this process, and which stages it will have."""
    try:
        events.make_room(folder)
    except OSError as error:
        _log.warning("progress is not written: %s", error)
    event = Event(time.time(), RUN, BEGAN, stages=tuple(stages), of=of, **events.this_process())
    _Teller(folder).write(event)


@contextmanager
def ending(folder: Path) -> Iterator[None]:
    """Say how a run has ended when the block does."""
    with _told(_Teller(folder), RUN):
        yield


@contextmanager
def stage(folder: Path, name: str, *, on_progress: Tell | None = None) -> Iterator[Tell]:
    """Say that a stage begins and how it ends, and warnings of ours in between.

    Gives what tells how far it is: it is called with `{"note", "share"}`, and `round`, `rounds`, `user`,
    `warning` where there are such; `on_progress` is told the same.
    """
    teller = _Teller(folder)
    teller.write(Event(time.time(), name, BEGAN, pid=os.getpid()))
    with _told(teller, name), _warnings(teller, name):

        def tell(said: dict[str, Any]) -> None:
            teller.tell(name, said)
            if on_progress:
                on_progress(said)

        yield tell


def done(folder: Path, name: str, *, seconds: float) -> None:
    """Say that a stage has ended that could not tell of its beginning: there was no folder yet."""
    _Teller(folder).write(Event(time.time(), name, DONE, seconds=seconds, pid=os.getpid()))


class _Teller:
    """Writes the lines of one run folder, and logs of them what a person would want to read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = Lines()
        self._last, self._round = 0.0, None

    def write(self, event: Event) -> None:
        for line in self._lines.of(event):
            _log.log(logging.WARNING if event.state in (WARNED, FAILED) else logging.INFO, line)
        try:
            events.append(self._folder, event)
        except OSError as error:
            _log.warning("progress is not written: %s", error)

    def tell(self, name: str, said: Mapping[str, Any]) -> None:
        """What a stage says while it goes on; nothing if it has said something a moment ago."""
        known = {key: said[key] for key in _SAID if said.get(key) is not None}
        if warning := known.pop("warning", None):
            self.write(Event(time.time(), name, WARNED, note=str(warning), pid=os.getpid()))
        now, number = time.monotonic(), known.get("round")
        if now - self._last >= EVERY_S or number != self._round or known.get("share") == 1.0:
            self._last, self._round = now, number
            self.write(Event(time.time(), name, GOING, pid=os.getpid(), **known))


@contextmanager
def _told(teller: _Teller, name: str) -> Iterator[None]:
    started = time.monotonic()
    state, note = FAILED, ""
    try:
        yield
        state = DONE
    except BaseException as error:  # a signal's too: whoever watches is told why it is over
        outside = "" if isinstance(error, Exception) else "stopped from outside: "
        note = f"{outside}{type(error).__name__}: {error}".removesuffix(": ")
        raise
    finally:
        seconds = time.monotonic() - started
        teller.write(Event(time.time(), name, state, note=note, seconds=seconds, pid=os.getpid()))


class _Warnings(logging.Handler):
    """Warnings of ours, of one thread: other targets are published to at the same time."""

    def __init__(self, teller: _Teller, name: str) -> None:
        super().__init__(logging.WARNING)
        self._teller, self._name, self._thread = teller, name, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.name != _log.name:
            note = record.getMessage()
            events_ = Event(time.time(), self._name, WARNED, note=note, pid=os.getpid())
            self._teller.write(events_)


@contextmanager
def _warnings(teller: _Teller, name: str) -> Iterator[None]:
    handler, logger = _Warnings(teller, name), logging.getLogger(_OURS)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
