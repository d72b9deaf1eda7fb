"""A source of users' text, opened: who is in it, how they are told apart, and one user's records.

What was found out about a source is kept for the process until a file of it changes, so that reading all
users one by one costs each file once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from soppu import user_ids
from soppu.data import rows
from soppu.data.arrow import Selection, choose, split_of
from soppu.data.examples import Record, passages
from soppu.data.index import ByColumn, stamp_of_names
from soppu.data.listing import Listing, look, stamp
from soppu.data.records import Layout, record, user_name
from soppu.data_settings import DataConfig
from soppu.errors import DataError

COLUMN: Final = "column"
FILE: Final = "file"
FOLDER: Final = "folder"
_KEPT = 4
_opened: OrderedDict[tuple[object, ...], Source] = OrderedDict()


class Source(Protocol):
    """Users by id. `faults` says who cannot be read, and why; who has no id is there under their name.

    `whole` is a single file that names no user: it is whoever's it is said to be. `unnamed` is then what is
    to be said where nobody is; None if the file's own name will do.
    """

    listing: Listing
    faults: dict[str, DataError]
    whole: bool
    unnamed: DataError | None

    def users(self) -> list[str]:
        """Everybody, those with a fault too, sorted."""

    def is_fresh(self, user: str = "") -> bool:
        """Whether what is known still holds, of everybody or of one user."""

    def records(self, user: str) -> list[Record]:
        """One user's records. DataError says what is wrong with them."""


class ByPlace:
    """A file a user, or a subfolder a user; or everything is one user's. Nothing is opened to list them."""

    unnamed: DataError | None = None

    def __init__(
        self, listing: Listing, places: list[tuple[str, Path]], layout: Layout, selection: Selection
    ) -> None:
        self.listing = listing
        self.faults: dict[str, DataError] = {}
        self.whole = listing.files == (listing.root,)
        self._layout, self._selection = layout, selection
        self._root = stamp_of_names(listing.root)
        self._first = places[0][1] if places else listing.root  # by which the layout was told
        self._state = stamp(self._first)
        self._places: dict[str, Path] = {}
        for name, path in places:
            try:
                self._place(user_ids.to_id(name), path)
            except DataError as error:
                self.faults[name] = DataError(f"{path}: {error}")

    def users(self) -> list[str]:
        """Everybody with a file or a folder."""
        return sorted({*self._places, *self.faults})

    def is_fresh(self, user: str = "") -> bool:
        """Whether files came or went; a user's own file is read anew each time."""
        return stamp_of_names(self.listing.root) == self._root and (
            bool(user) or stamp(self._first) == self._state
        )

    def records(self, user: str) -> list[Record]:
        """All that is in a user's file or folder. O(that user's bytes)."""
        if user in self.faults:
            raise self.faults[user]
        if user not in self._places and not self.whole:
            return []
        place = self.listing.root if self.whole else self._places[user]
        found = [item for path in look(place).everything() for item in self._of_file(path, user)]
        if not found:
            raise DataError(f"{place}: user without examples: it holds no text")
        return found

    def _place(self, user: str, path: Path) -> None:
        other = self._places.setdefault(user, path)
        if other != path:
            self.faults[user] = DataError(f"{other} and {path.name}: both are of user {user}; join them")

    def _of_file(self, path: Path, user: str) -> Iterator[Record]:
        if rows.ending(path) == rows.TEXT:
            yield from map(Record, passages(rows.read_text(path)))
            return
        for number, row in rows.read_rows(path, self._selection):
            where = f"{path}:{number}"
            yield record(row, where, self._layout, user=False)
            name = user_name(row, self._layout)
            if name is not None and user_ids.to_id(name) != user:
                raise DataError(
                    f"{where}: names user {name!r}, in what is {user}'s by its place; set data.user_from ="
                    " 'column', or data.user_column = \"\" if that column is something else"
                )


def open_source(config: DataConfig, user: str = "") -> Source:
    """The source of `data.source`, as it is now: of everybody, or at least of one user.

    Raises:
        DataError: it cannot be read, or nothing says whose text is whose.
    """
    columns = (config.user_column, config.date_column, config.columns)
    key = (config.source, config.user_from, columns, config.split)
    known = _opened.get(key)
    if known is None or not known.is_fresh(user):
        _opened.pop(key, None)
        known = _opened[key] = _open(config)
    _opened.move_to_end(key)
    while len(_opened) > _KEPT:
        _opened.popitem(last=False)
    return known


def _open(config: DataConfig) -> Source:
    layout = Layout.of(config)
    selection = Selection(config.split, layout.wanted(), layout.user)
    listing = of_split(look(Path(config.source)), config.split)
    kind, unnamed = config.user_from, None
    if kind == "auto":
        kind, unnamed = _told_apart(listing, layout, selection)
    if kind == COLUMN:
        return ByColumn(listing, layout, selection)
    if kind == FOLDER:
        folders = [path for path in listing.folders if next(look(path, empty=True).everything(), None)]
        return ByPlace(listing, [(path.name, path) for path in folders], layout, selection)
    found = ByPlace(listing, [(rows.stem(path), path) for path in listing.files], layout, selection)
    found.unnamed = unnamed
    return found


def of_split(listing: Listing, split: str) -> Listing:
    """Without the files of other splits, where files are called as the hub's are."""
    named = {found for path in listing.tables() if (found := split_of(path))}
    if len(named) < 2:
        return listing
    chosen = choose(split, named, listing.root)
    kept = tuple(path for path in listing.tables() if split_of(path) in ("", chosen))
    return Listing(listing.root, kept, (), listing.ignored)


def _told_apart(
    listing: Listing, layout: Layout, selection: Selection
) -> tuple[Literal["column", "file", "folder"], DataError | None]:
    """By a row of the first table that has one: with the user's column, by that; else by file or folder."""
    files = listing.tables()
    if any(rows.ending(path) == rows.TEXT for path in files):
        return FILE if listing.files else FOLDER, None
    row: Any = next(filter(None, (_first_row(path, selection) for path in files)), None)
    if row is None or layout.user in row:
        return COLUMN, None  # which says what is wrong where no row can be read
    if files != (listing.root,):
        return FILE if listing.files else FOLDER, None
    try:
        record(row, f"{listing.root}:1", layout, user=True)
    except DataError as error:
        return FILE, error
    return FILE, None


def _first_row(path: Path, selection: Selection) -> Any:
    try:
        return next(
            (row for _, row in islice(rows.read_rows(path, selection), 1) if isinstance(row, dict)), None
        )
    except DataError:
        return None
