"""What a source holds, in one hash: a stage that reads text is cached by it."""

from __future__ import annotations

import hashlib
import platform
import time
from pathlib import Path

from soppu import files
from soppu.data import arrow
from soppu.data.listing import STDLIB, STDLIB_PUBLIC, Stamp, look, stamp
from soppu.errors import DataError

_TICK_NS = 100_000_000  # file systems' clocks tick in steps: a file changed just now may change unseen
_known: dict[Path, tuple[Stamp, str]] = {}


def source_digest(source: str) -> str:
    """Content hash of all text of a source, users' or public; DataError if it cannot be read.

    O(bytes) the first time, then O(files) until one of them changes.
    """
    if source in (STDLIB, STDLIB_PUBLIC):
        return f"{source} {platform.python_version()}"
    root = Path(source)
    if root.is_dir():
        parts = [f"{path.relative_to(root)} {_of_one(path)}" for path in look(root).everything()]
    else:
        parts = [f"{path.name} {_digest(path)}" for path in look(root).files]
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def _of_one(path: Path) -> str:
    """Of a file among others: one that cannot be read is its user's fault, and no end of the others."""
    try:
        return _digest(path)
    except DataError as error:
        return str(error)


def _digest(path: Path) -> str:
    state = stamp(path)
    found = _known.get(path)
    if found is None or found[0] != state:
        try:
            members = sorted(path.rglob("*")) if arrow.is_dataset(path) else [path]
            sums = [f"{one.name} {files.sha256_file(one)}" for one in members if one.is_file()]
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        found = state, hashlib.sha256("\n".join(sums).encode(errors="surrogateescape")).hexdigest()
        if max(changed for changed, *_ in state) < time.time_ns() - _TICK_NS:
            _known[path] = found
    return found[1]
