"""What a run says of each of its users, in a file of its own: memory does not grow with users times runs."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE users (id TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE texts (user TEXT NOT NULL, place INTEGER NOT NULL, PRIMARY KEY (user, place)) WITHOUT ROWID;
"""
Facts = Mapping[str, Any]


def write(path: Path, users: Iterable[Facts], texts: Iterable[tuple[str, int]]) -> None:
    """Write the file: what a report says of each user, and where in the file of texts each has examples."""
    with closing(sqlite3.connect(path)) as made:
        made.executescript(_TABLES)
        with made:
            rows = ((one["id"], json.dumps(one)) for one in users)
            made.executemany("INSERT OR REPLACE INTO users VALUES (?, ?)", rows)
            made.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?)", texts)


class Measured:
    """Such a file, opened; its name is taken away, so that nothing is left of it when the process ends."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._opened = sqlite3.connect(
            f"{path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        self._all("SELECT count(*) FROM users", ())  # it is read once before the name goes
        path.unlink()

    def of(self, users: Sequence[str]) -> dict[str, Facts]:
        """What is said of these users, of whom it says something. O(users asked for)."""
        asked = f"SELECT id, facts FROM users WHERE id IN ({','.join('?' * len(users))})"
        return {user: json.loads(facts) for user, facts in self._all(asked, users)}

    def places(self, user: str, *, limit: int) -> list[int]:
        """Where in the file of texts the first examples of a user begin."""
        asked = "SELECT place FROM texts WHERE user = ? ORDER BY place LIMIT ?"
        return [place for (place,) in self._all(asked, (user, limit))]

    def close(self) -> None:
        """Give the disk back; who asks later gets nothing."""
        with self._lock:
            self._opened.close()

    def _all(self, asked: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            try:
                return self._opened.execute(asked, values).fetchall()
            except sqlite3.ProgrammingError:  # closed: the run is no longer among the newest
                return []
