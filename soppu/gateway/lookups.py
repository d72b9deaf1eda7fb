"""Looks into the catalogue beside the event loop, and keeps what it found until anybody has changed anything.

SQLite tells in microseconds whether another connection has committed since (`PRAGMA data_version`). So a key
that was revoked, or a version that was published, counts from the next request on, and a request costs no
query where nothing has changed. Other databases are asked each time.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

from soppu.errors import RegistryError
from soppu.registry.catalogue import Catalogue

T = TypeVar("T")
_THREADS = 8  # of its own: no slow issuer of tokens holds these up
_KEPT = 50_000


class Lookups:
    """Answers of one catalogue. For one event loop."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="soppu-catalogue")
        self._changes = _Changes(catalogue.file) if catalogue.file else None
        self._known: dict[tuple[Callable[[str], Any], str], Any] = {}
        self._mark: Hashable = None

    async def do(self, question: Callable[[str], T], asked: str) -> T:
        """What `question` says, which is a method or a function. Raises what it raises, and RegistryError."""
        if self._changes is None:
            return await self._ask(question, asked)
        mark = self._changes.mark()
        if mark != self._mark:
            self._known.clear()
            self._mark = mark
        found: T | None = self._known.get((question, asked))
        if found is not None:
            return found
        answer = await self._ask(question, asked)
        # only what was found while nothing changed is of this mark
        if answer is not None and mark == self._mark == self._changes.mark():
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[question, asked] = answer
        return answer

    def close(self) -> None:
        """End the threads, once they have nothing to do."""
        self._pool.shutdown(wait=False)
        if self._changes is not None:
            self._changes.close()

    async def _ask(self, question: Callable[[str], T], asked: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, question, asked)


class _Changes:
    """Tells whether a SQLite file is what it was: the same file, and nothing committed to it since."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._connection: sqlite3.Connection | None = None

    def mark(self) -> Hashable:
        """Another value after every change. RegistryError: the file is not there, or cannot be read."""
        try:
            told = os.stat(self._path)
            file = (told.st_dev, told.st_ino)
            if self._connection is None or file != self._file:  # put in the place of the one that was there
                self.close()
                self._connection = sqlite3.connect(
                    f"file:{quote(self._path)}?mode=ro", uri=True, check_same_thread=False
                )
                self._file = file
            return file, self._connection.execute("PRAGMA data_version").fetchone()[0]
        except (OSError, sqlite3.Error) as error:
            raise RegistryError(f"catalogue {self._path}: {error}") from error

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
