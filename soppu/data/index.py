"""A source whose rows name their users: read once to know where every user's rows lie, then row by row.

JSONL is read where it lies. Rows of other formats cannot be reached by an offset, so they are written as
JSONL into a temporary file without a name, which ends with this process and which nobody else can open.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soppu import user_ids
from soppu.data import rows
from soppu.data.arrow import Selection
from soppu.data.examples import Record
from soppu.data.listing import Listing, Stamp, look, stamp
from soppu.data.records import Layout, record, user_name
from soppu.errors import DataError

_FIELDS = 4  # of a row: file, offset, length, number


class ByColumn:
    """Users told apart by a column. Building it is O(bytes); a user's rows are O(that user's bytes)."""

    whole = False
    unnamed: DataError | None = None

    def __init__(self, listing: Listing, layout: Layout, selection: Selection) -> None:
        self.listing = listing
        self.faults: dict[str, DataError] = {}
        self._layout, self._selection = layout, selection
        self._files = listing.tables()
        self._in_place = [_in_place(path) for path in self._files]
        self._stamps: list[Stamp] = []
        self._rows: dict[str, array[int]] = {}
        self._names: dict[str, str] = {}
        self._of_file: list[set[str]] = []  # the first two users of every file
        self._broken: dict[int, DataError] = {}
        self._spool = tempfile.TemporaryFile()  # open as long as the index is
        self._root = stamp_of_names(listing.root)
        self._everything = tuple(look(listing.root).everything())
        for number, path in enumerate(self._files):
            self._read(number, path)
        self._blame()

    def users(self) -> list[str]:
        """Everybody with a row, and who cannot be read, by name."""
        return sorted({*self._rows, *self.faults})

    def is_fresh(self, user: str = "") -> bool:
        """Whether no file has changed, of all or of one user's, since this was built."""
        try:
            if stamp_of_names(self.listing.root) != self._root:
                return False
            if not user and tuple(look(self.listing.root).everything()) != self._everything:
                return False
            numbers = set(self._rows.get(user, ())[::_FIELDS]) if user else range(len(self._files))
            return all(stamp(self._files[number]) == self._stamps[number] for number in numbers)
        except DataError:  # it is gone, or no longer ours to read
            return False

    def records(self, user: str) -> list[Record]:
        """A user's rows, in the order of the files. DataError says what is wrong with one of them."""
        if user in self.faults:
            raise self.faults[user]
        spans = self._rows.get(user, array("q"))
        return list(self._records(spans))

    def _records(self, spans: array[int]) -> Iterator[Record]:
        opened: dict[int, int] = {}
        try:
            for start in range(0, len(spans), _FIELDS):
                number, offset, length, row = spans[start : start + _FIELDS]
                path = self._files[number]
                if self._in_place[number] and number not in opened:
                    opened[number] = os.open(path, os.O_RDONLY)
                handle = opened.get(number, self._spool.fileno())
                where = f"{path}:{row}"
                value = rows.parse(os.pread(handle, length, offset), where)
                yield record(value, where, self._layout, user=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        finally:
            for handle in opened.values():
                os.close(handle)

    def _read(self, number: int, path: Path) -> None:
        self._of_file.append(set())
        try:
            self._stamps.append(stamp(path))
            if rows.ending(path) == rows.TEXT:
                raise DataError(f"{path}: plain text names no user; set data.user_from = 'file' or 'folder'")
            if self._in_place[number]:
                with rows.opened(path) as stream:
                    for line, offset, content in rows.lines(stream):
                        span = (number, offset, len(content), line)
                        self._add(span, rows.parse(content, f"{path}:{line}"))
            else:
                for line, value in rows.read_rows(path, self._selection):
                    self._add((number, *self._spooled(value), line), value)
            if not self._of_file[number] and number not in self._broken:
                raise DataError(f"{path}: user without examples: the file holds no line")
        except DataError as error:
            if len(self._stamps) == number:
                self._stamps.append(())
            self._broken.setdefault(number, error)

    def _add(self, span: tuple[int, int, int, int], value: Any) -> None:
        number, *_, line = span
        where = f"{self._files[number]}:{line}"
        name = user_name(value, self._layout)
        try:
            record(value, where, self._layout, user=True)
            fault = None
        except DataError as error:
            fault = error
        if name is None:
            assert fault is not None  # a row has to name its user
            self._broken.setdefault(number, fault)
            return
        try:
            user = user_ids.to_id(name)
        except DataError as error:
            self.faults.setdefault(name, DataError(f"{where}: {error}"))
            return
        if self._names.setdefault(user, name) != name:
            fault = DataError(f"{where}: user names {self._names[user]!r} and {name!r} are one id, {user}")
        if fault:
            self.faults.setdefault(user, fault)
        self._rows.setdefault(user, array("q")).extend(span)
        if len(self._of_file[number]) < 2:
            self._of_file[number].add(user)

    def _spooled(self, value: Any) -> tuple[int, int]:
        offset = self._spool.seek(0, os.SEEK_END)
        if isinstance(value, dict):
            wanted = self._selection.columns
            value = {key: item for key, item in value.items() if key in wanted} or dict.fromkeys(value)
        content = b"" if isinstance(value, DataError) else json.dumps(value, default=str).encode()
        self._spool.write(content)
        return offset, len(content)

    def _blame(self) -> None:
        """A broken file ends the run of its own user, if all others are one user's too; else everybody's."""
        self._spool.flush()
        if not self._broken:
            return
        whole = [users for number, users in enumerate(self._of_file) if number not in self._broken]
        alone = all(len(users) == 1 for users in (*whole, *(self._of_file[n] or {""} for n in self._broken)))
        if not alone or len(self._files) == 1:
            raise next(iter(self._broken.values()))
        for number, error in self._broken.items():
            users = self._of_file[number] or {user_ids.to_id(rows.stem(self._files[number]))}
            self.faults |= {user: self.faults.get(user, error) for user in users}


def stamp_of_names(root: Path) -> Stamp:
    """Changes when a file comes to a folder or goes; what is in one is not looked at. O(1)."""
    try:
        state = root.stat()
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from None
    return ((state.st_mtime_ns, state.st_ctime_ns, state.st_ino),) if root.is_dir() else ()


def _in_place(path: Path) -> bool:
    return rows.ending(path) in rows.LINES and not path.name.lower().endswith(".gz")
