"""One run folder, read: its line in the list of runs, and a file of what it says of its users.

python -m soppu.dashboard.reading FOLDER AT FILE

does it in a process of its own: a report of a hundred thousand users takes seconds in which Python does
nothing else, and a page would wait for it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from soppu.dashboard import measured
from soppu.errors import ReportError
from soppu.evaluate import report as reports
from soppu.evaluate.tradeoff import schema

_SHOWN = 400  # characters of what went wrong


@dataclass(frozen=True)
class RunLine:
    """One run folder. What its report would say is None before there is one."""

    name: str
    folder: str
    at: str
    users: int | None = None
    passed: bool | None = None
    reasons: tuple[str, ...] = ()
    gain: Mapping[str, Any] | None = None  # over the base model: mean, low, high
    kept: float | None = None
    ratio: float | None = None
    bytes: int | None = None
    bundle_id: str = ""
    method: str = ""
    seconds: float | None = None
    texts: str = ""  # file of the newest comparison's examples
    fault: str = ""  # why its report cannot be read
    waits: bool = False  # it is large, and being read

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)


Read = Callable[[RunLine, Path], RunLine]


def read(line: RunLine, into: Path) -> RunLine:
    """The line of a folder that has a report, with `into` written, or what is wrong with it. O(users)."""
    try:
        told = reports.read(line.path / reports.JSON_FILE)
    except (ReportError, OSError) as error:
        return replace(line, fault=str(error))
    texts = _texts(line.path)
    try:
        measured.write(into, told["users"], _places(line.path / texts) if texts else ())
    except sqlite3.Error as error:
        return replace(line, fault=f"what it says of users cannot be kept here: {error}")
    gate, made = told["gate"], told["compression"]
    return replace(
        line,
        at=told["created"],
        users=len(told["users"]),
        passed=gate["passed"],
        reasons=tuple(gate["reasons"]),
        gain=told["gains"]["over_base"],
        kept=gate["mean_gain_kept"],
        ratio=made["ratio"],
        bytes=made["bytes_after"],
        bundle_id=made["bundle_id"],
        method=made["method"],
        seconds=sum(stage["seconds"] for stage in told["stages"]),
        texts=texts,
    )


def read_apart(line: RunLine, into: Path) -> RunLine:
    """The same by another process, with what went wrong there as the line's fault."""
    words = [sys.executable, "-m", "soppu.dashboard.reading", line.folder, line.at, str(into)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-_SHOWN:] or f"it ended with {done.returncode}"
        return replace(line, fault=f"its report could not be read: {said}")
    told = json.loads(done.stdout)
    return RunLine(**{**told, "reasons": tuple(told["reasons"])})


def example(path: Path, place: int) -> Mapping[str, Any] | None:
    """The line of a file of texts that begins at a place; None where there is none any more."""
    try:
        with path.open("rb") as lines:
            lines.seek(place)
            told = json.loads(lines.readline())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def _texts(folder: Path) -> str:
    """The name of the file of texts that the newest comparison has; "" without one."""
    try:
        return Path(json.loads((folder / schema.FILE).read_text())["texts"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # there is none, or it is being written


def _places(path: Path) -> Iterator[tuple[str, int]]:
    """Whose example each line is, and where it begins."""
    try:
        with path.open("rb") as lines:
            place = 0
            for line in lines:
                yield str(json.loads(line)["user"]), place
                place += len(line)
    except (OSError, ValueError, KeyError, TypeError):
        return  # what was read until there is whole


def tell(folder: str, at: str, into: str) -> None:
    """Write `into`, and the line as JSON to standard output."""
    found = read(RunLine(Path(folder).name, folder, at), Path(into))
    sys.stdout.write(json.dumps(asdict(found)))


if __name__ == "__main__":
    os.nice(10)  # servers and pages come first
    tell(*sys.argv[1:])
