"""Run folders as the page shows them: how each ended, how far one in flight is, what each says of a user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soppu.errors import ReportError
from soppu.evaluate import report as reports
from soppu.evaluate.tradeoff import schema
from soppu.progress.followed import Followed
from soppu.progress.picture import Picture

PAGES = (reports.HTML_FILE, schema.PAGE)  # of a run, for people
_KEPT = 8  # runs whose users are held in memory
_TEXTS = 3  # examples of one user


@dataclass(frozen=True)
class RunLine:
    """One run folder. What its report would say is None before there is one."""

    name: str
    folder: Path
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
    fault: str = ""  # why its report cannot be read


@dataclass
class _Held:
    stamp: tuple[int, int]
    line: RunLine
    users: dict[str, Mapping[str, Any]] = field(default_factory=dict)


class Runs:
    """The run folders below one folder; `refresh` reads what is new, all else only what was read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[str, _Held] = {}
        self._followed: dict[str, Followed] = {}
        self._flights: dict[str, Picture] = {}

    def refresh(self) -> None:
        """Read the reports that changed, and how far runs are. For one thread. O(what changed)."""
        folders = [one for one in _folders(self._root) if not one.is_symlink()]
        held = {}
        for folder in folders:
            path = folder / reports.JSON_FILE
            stamp = _stamp(path) or _stamp(folder / "config.toml")
            if stamp is None:
                continue
            before = self._held.get(folder.name)
            held[folder.name] = before if before and before.stamp == stamp else _read(folder, stamp)
        newest = sorted(held, key=lambda name: held[name].line.at, reverse=True)
        for name in newest[_KEPT:]:
            held[name].users = {}
        self._held = held  # one assignment: who reads sees all of it or nothing
        self._followed = {one.name: self._followed.get(one.name) or _followed(one) for one in folders}
        looked = {name: one.look() for name, one in self._followed.items()}
        self._flights = {name: found for name, found in looked.items() if found.stages and not found.ended}

    def lines(self) -> list[RunLine]:
        """All runs, newest first."""
        return sorted((one.line for one in self._held.values()), key=lambda line: line.at, reverse=True)

    def line(self, name: str) -> RunLine | None:
        """One run."""
        held = self._held.get(name)
        return held.line if held else None

    def flights(self) -> dict[str, Picture]:
        """Runs that have begun and not ended, and whose process is not known to be gone."""
        return dict(self._flights)

    def of_user(self, user: str) -> list[tuple[RunLine, Mapping[str, Any]]]:
        """What the newest runs measured of one user."""
        found = [(one.line, one.users[user]) for one in self._held.values() if user in one.users]
        return sorted(found, key=lambda pair: pair[0].at, reverse=True)

    def texts(self, run: str, user: str) -> list[Mapping[str, Any]]:
        """Examples of one user from a run's comparison: prompt, reference, each arm's text; [] for none."""
        held = self._held.get(run)
        if held is None:
            return []
        try:
            told = json.loads((held.line.folder / schema.FILE).read_text())
            path = held.line.folder / Path(told["texts"]).name
            with path.open() as lines:
                mine = (one for one in map(json.loads, lines) if one.get("user") == user)
                return [one for one, _ in zip(mine, range(_TEXTS), strict=False)]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # there is none, or it is being written


def _followed(folder: Path) -> Followed:
    found = Followed(folder)
    found.look()  # that a process is gone is seen from the second look on
    return found


def _folders(root: Path) -> list[Path]:
    try:
        return [one for one in root.iterdir() if one.is_dir() and not one.name.startswith(".")]
    except OSError:
        return []


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _at(stamp: tuple[int, int]) -> str:
    return datetime.fromtimestamp(stamp[0] / 1e9, UTC).isoformat(timespec="seconds")


def _read(folder: Path, stamp: tuple[int, int]) -> _Held:
    path = folder / reports.JSON_FILE
    if not path.exists():
        return _Held(stamp, RunLine(folder.name, folder, _at(stamp)))
    try:
        told = reports.read(path)
    except (ReportError, OSError) as error:
        return _Held(stamp, RunLine(folder.name, folder, _at(stamp), fault=str(error)))
    gate, made = told["gate"], told["compression"]
    line = RunLine(
        folder.name,
        folder,
        told["created"],
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
    )
    return _Held(stamp, line, {one["id"]: one for one in told["users"]})
