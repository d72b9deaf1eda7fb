"""The lines of a run's `progress.jsonl`: one JSON object each, appended in one write, never changed.

A run that begins again, in whatever process, appends to the same file: what holds is what follows the last
line of stage "run" that says "began", as far as the process that wrote it did.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

FILE = "progress.jsonl"
RUN = "run"  # the stage that the beginning and the end of all of it are told of
BEGAN, GOING, WARNED, DONE, FAILED = "began", "going", "warned", "done", "failed"
_MOST_BYTES = 4 << 20  # of nightly runs that share a folder: then the file begins anew
_LONGEST = 1000  # characters of a note


@dataclass(frozen=True)
class Event:
    """One line. What is not known of it is left out there, and is as here.

    Attributes:
        at: seconds since 1970.
        state: "began", "going", "warned", "done" or "failed".
        note: for people: what is going on, a warning, or the error that ended the stage.
        share: of the stage that is behind it, 0 to 1.
        round: of a federation, from 1; `rounds` is how many there are, as far as that is known.
        user: whose turn it is, or whose has just ended.
        seconds: how long the stage took.
        pid: of the process that wrote it.
        stages: of a run that begins: what it will do, in order.
        of: of a run that begins: who asked for it, such as the id of Prefect's flow run.
        machine: of a run that begins: where process ids mean what they say.
        since: of a run that begins: when its process was started, which tells it from a later one.
    """

    at: float
    stage: str
    state: str = GOING
    note: str = ""
    share: float | None = None
    round: int | None = None
    rounds: int | None = None
    user: str | None = None
    seconds: float | None = None
    pid: int = 0
    stages: tuple[str, ...] = ()
    of: str = ""
    machine: str = ""
    since: float = 0.0


_KINDS: dict[str, tuple[type, ...]] = {
    **{name: (int, float) for name in ("at", "share", "seconds", "since")},
    **{name: (int,) for name in ("round", "rounds", "pid")},
    **{name: (str,) for name in ("stage", "state", "note", "user", "of", "machine")},
    "stages": (list,),
}


def append(folder: Path, event: Event) -> None:
    """Add a line to a run folder. OSError if the disk refuses it."""
    known = {field.name: field.default for field in fields(Event)}
    values = {name: value for name, value in asdict(event).items() if value != known[name]}
    values["note"] = event.note[:_LONGEST]
    line = json.dumps(values).encode() + b"\n"
    handle = os.open(folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        # a line that was cut short by a full disk, or a dead machine, takes none of ours with it
        whole = size == 0 or os.pread(handle, 1, size - 1) == b"\n"
        os.write(handle, line if whole else b"\n" + line)
    finally:
        os.close(handle)


def make_room(folder: Path) -> None:
    """Put a file that has grown large aside, over the one before it."""
    path = folder / FILE
    if path.exists() and path.stat().st_size > _MOST_BYTES:
        path.replace(path.with_suffix(".before.jsonl"))


def parse(line: bytes) -> Event | None:
    """What a line says; None where it says nothing of this form: it was cut, or is a later version's."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not {"at", "stage"} <= values.keys():
        return None
    known = {name: value for name, value in values.items() if name in _KINDS and value is not None}
    if not all(type(value) in _KINDS[name] for name, value in known.items()):
        return None
    if "stages" in known:
        known["stages"] = tuple(map(str, known["stages"]))
    return Event(**known)


class Reader:
    """Reads a file that grows, line by line; one that was begun anew is read from its beginning.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place, self._file = 0, 0

    def read(self) -> list[Event]:
        """What was added since the last call. A line without its end is left for the next."""
        try:
            with self._path.open("rb") as stream:
                found = os.fstat(stream.fileno())
                if found.st_ino != self._file or found.st_size < self._place:
                    self._place, self._file = 0, found.st_ino
                stream.seek(self._place)
                data = stream.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        return [event for line in whole.splitlines() if (event := parse(line)) is not None]


def last_run(events: Iterable[Event]) -> list[Event]:
    """The lines of the run that began last, without those of other processes that share its folder."""
    found: list[Event] = []
    for event in events:
        if (event.stage, event.state) == (RUN, BEGAN):
            found = [event]
        elif not found or event.pid == found[0].pid:
            found.append(event)
    return found


def machine() -> str:
    """Names what a process id is unique in: this boot of this machine, or of a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def this_process() -> dict[str, Any]:
    """What the line of a run that begins says of the process it runs in."""
    return {"pid": os.getpid(), "machine": machine(), "since": psutil.Process().create_time()}


def is_gone(began: Event) -> bool:
    """Whether the process of a run has died. False where that cannot be seen from here."""
    if not began.pid or began.machine != machine():
        return False
    try:
        process = psutil.Process(began.pid)
        ours = abs(process.create_time() - began.since) < 1.0
        return not ours or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # another user's, on a system that hides them
        return False
