"""Run folders as the page shows them: how each ended, how far one in flight is, what each says of a user."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from soppu.dashboard import reading
from soppu.dashboard.measured import Facts, Measured
from soppu.dashboard.reading import RunLine
from soppu.evaluate import report as reports
from soppu.evaluate.tradeoff import schema
from soppu.progress.events import FAILED
from soppu.progress.followed import Followed
from soppu.progress.picture import Picture

PAGES = {reports.HTML_FILE: "the report", schema.PAGE: "arms compared"}  # of a run, for people
_KEPT = 8  # runs whose users are at hand
_TEXTS = 3  # examples of one user
_LARGE = 1 << 20  # bytes that are read by another process: a view would wait for them
Stamp = tuple[int, ...]


@dataclass
class _Held:
    stamp: Stamp
    line: RunLine
    measured: Measured | None = None


@dataclass(frozen=True)
class Standing:
    """How a run is, in a word, of which kind the word is, and why."""

    word: str
    kind: str  # "good", "bad", "busy" or "quiet"
    why: str = ""


class Runs:
    """The run folders below one folder; `refresh` reads what is new, all else only what was read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[str, _Held] = {}
        self._followed: dict[str, Followed] = {}
        self._pictures: dict[str, Picture] = {}
        self._place = tempfile.TemporaryDirectory(prefix="soppu-dashboard-", ignore_cleanup_errors=True)

    def refresh(self) -> None:
        """Read what changed, but for large reports, and how far runs are. For one thread. O(what changed)."""
        folders = [one for one in _folders(self._root) if not one.is_symlink()]
        held = {}
        for folder in folders:
            stamp = _stamp(folder)
            if stamp is None:
                continue
            before = self._held.get(folder.name)
            held[folder.name] = before if before and before.stamp == stamp else self._read(folder, stamp)
        gone = [one for name, one in self._held.items() if held.get(name) is not one]
        self._held = held  # one assignment: who reads sees all of it or nothing
        newest = sorted(held.values(), key=lambda one: one.line.at, reverse=True)
        for one in (*gone, *newest[_KEPT:]):
            _let_go(one)
        for one in newest[:_KEPT]:  # a newer run has gone: what was let go is read again
            if one.line.users is not None and one.measured is None:
                one.line = replace(one.line, waits=True)
        self._followed = {one.name: self._followed.get(one.name) or _followed(one) for one in folders}
        self._pictures = {name: _look(one) for name, one in self._followed.items()}

    def read_large(self) -> None:
        """Read the large reports that `refresh` found, by another process. For one thread."""
        for one in list(self._held.values()):
            if one.line.waits:
                self._take(one, reading.read_apart)

    def lines(self) -> list[RunLine]:
        """All runs, newest first."""
        return sorted((one.line for one in self._held.values()), key=lambda line: line.at, reverse=True)

    def line(self, name: str) -> RunLine | None:
        """One run."""
        held = self._held.get(name)
        return held.line if held else None

    def flights(self) -> dict[str, Picture]:
        """Runs that have begun and not ended, and whose process is not known to be gone."""
        found = self._pictures.items()
        return {name: seen for name, seen in found if seen.stages and not seen.ended}

    def standing(self, line: RunLine) -> Standing:
        """How a run is: what its gate said, how far it is, or what ended it before there was a verdict."""
        seen = self._pictures.get(line.name, Picture())
        if seen.stages and not seen.ended:
            return Standing("in flight", "busy", seen.now.name if seen.now else "")
        if line.fault:
            return Standing("unreadable", "bad", line.fault)
        if line.waits:
            return Standing("being read", "busy", "a large report")
        if line.passed is not None:
            why = "; ".join(line.reasons)
            return Standing("passed", "good") if line.passed else Standing("refused", "bad", why)
        if seen.ended == FAILED:
            return Standing("failed", "bad", seen.error)
        return Standing("no report", "quiet")

    def of_users(self, users: Sequence[str]) -> dict[str, list[tuple[RunLine, Facts]]]:
        """What the newest runs measured of each of these users, the newest first. O(users asked for)."""
        found: dict[str, list[tuple[RunLine, Facts]]] = {user: [] for user in users}
        for one in sorted(self._held.values(), key=lambda one: one.line.at, reverse=True):
            for user, facts in (one.measured.of(users) if one.measured else {}).items():
                found[user].append((one.line, facts))
        return found

    def texts(self, run: str, user: str) -> list[Mapping[str, object]]:
        """Examples of one user from a run's comparison: prompt, reference, each arm's text; [] for none."""
        held = self._held.get(run)
        if held is None or held.measured is None:
            return []
        path = held.line.path / held.line.texts
        found = (reading.example(path, place) for place in held.measured.places(user, limit=_TEXTS))
        return [one for one in found if one and one.get("user") == user]  # not if it was written anew since

    def _read(self, folder: Path, stamp: Stamp) -> _Held:
        found = _Held(stamp, RunLine(folder.name, str(folder), _at(stamp)))
        if (folder / reports.JSON_FILE).exists():
            if max(stamp[1], stamp[3]) > _LARGE:
                found.line = RunLine(folder.name, str(folder), _at(stamp), waits=True)
            else:
                self._take(found, reading.read)
        return found

    def _take(self, held: _Held, read: reading.Read) -> None:
        into = Path(self._place.name) / uuid.uuid4().hex  # two threads may read one run, of before and after
        try:
            line = read(RunLine(held.line.name, held.line.folder, held.line.at), into)
            if not line.fault:
                held.measured = Measured(into)
            held.line = line
        finally:
            into.unlink(missing_ok=True)


def _let_go(held: _Held) -> None:
    if held.measured is not None:
        held.measured.close()
        held.measured = None


def _followed(folder: Path) -> Followed:
    found = Followed(folder)
    _look(found)  # that a process is gone is seen from the second look on
    return found


def _look(followed: Followed) -> Picture:
    """The run as it is now, or as it was when it could be read: one folder keeps no other from being seen."""
    try:
        return followed.look()
    except OSError:
        return followed.picture


def _folders(root: Path) -> list[Path]:
    try:
        return [one for one in root.iterdir() if one.is_dir() and not one.name.startswith(".")]
    except OSError:
        return []


def _stamp(folder: Path) -> Stamp | None:
    """Time and size of the report, or of the settings before there is one, and of the comparison."""
    first = _of_file(folder / reports.JSON_FILE) or _of_file(folder / "config.toml")
    return None if first is None else (*first, *(_of_file(folder / schema.FILE) or (0, 0)))


def _of_file(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _at(stamp: Stamp) -> str:
    return datetime.fromtimestamp(stamp[0] / 1e9, UTC).isoformat(timespec="seconds")
