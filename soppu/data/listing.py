"""Which files a source holds, and when one of them has changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soppu.data import arrow, rows
from soppu.errors import DataError

STDLIB = "stdlib"
STDLIB_PUBLIC = "stdlib-public"
Stamp = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Listing:
    """A source's root: the readable files in it, the folders in it, and what is none of our formats."""

    root: Path
    files: tuple[Path, ...]
    folders: tuple[Path, ...] = ()
    ignored: tuple[Path, ...] = ()

    def everything(self) -> Iterator[Path]:
        """All readable files at any depth, by name. O(files)."""
        yield from self.files
        for folder in self.folders:
            yield from look(folder, empty=True).everything()

    def tables(self) -> tuple[Path, ...]:
        """The files at the top, or where there are none those of all folders below."""
        return self.files or tuple(self.everything())


def look(root: Path, *, empty: bool = False) -> Listing:
    """List a file, a dataset's folder, or a folder of files and folders; hidden ones are left out.

    Raises:
        DataError: there is nothing there, or, unless `empty` is allowed, nothing that can be read.
    """
    try:
        if root.is_file() or arrow.is_dataset(root):
            if not rows.ending(root):
                raise DataError(f"{root}: not of a format that is read; {_formats()}")
            return Listing(root, (root,))
        entries = sorted(root.iterdir()) if root.is_dir() else None
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from None
    if entries is None:
        raise DataError(f"{root}: no such file or folder, and not {STDLIB!r}")
    shown = [path for path in entries if not path.name.startswith(".")]
    readable = tuple(path for path in shown if rows.ending(path))
    others = [path for path in shown if not rows.ending(path)]
    folders = tuple(path for path in others if path.is_dir())
    ignored = tuple(path for path in others if not path.is_dir())
    found = Listing(root, readable, folders, ignored)
    if not empty and next(found.everything(), None) is None:
        raise DataError(f"{root}: no *.jsonl files, nor others that are read; {_formats()}, or {STDLIB!r}")
    return found


def stamp(path: Path) -> Stamp:
    """Changes when the file does: times, size and inode of it, or of all files of a dataset's folder."""
    try:
        members = sorted(path.iterdir()) if path.is_dir() else []
        nested = [part for one in members if one.is_dir() for part in stamp(one)]
        states = [one.stat() for one in (path, *members)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return (*((s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino) for s in states), *nested)


def _formats() -> str:
    return (
        f"give a file ending in {', '.join(rows.FORMATS)} (text formats also .gz), a folder of them, a folder"
        " with one subfolder a user, or what Dataset.save_to_disk wrote"
    )
