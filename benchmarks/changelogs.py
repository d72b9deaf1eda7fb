"""Text by author and date that a Debian machine has: the signed entries of its packages' changelogs.

An author is whoever's address an entry is signed with, and is called by a hash of it; no name or address
leaves this file but inside the entries themselves. A prompt is an entry's heading, the completion its body.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from soppu.data.examples import Example, Record

ROOT = Path("/usr/share/doc")
_FILES = "*/changelog*.gz"
SHORTEST = 40  # characters of a body
UNTIL = datetime(2026, 11, 1, tzinfo=UTC)  # later entries do not count: an upgraded package changes nobody
_SIGNED = re.compile(r" -- .*<(?P<address>[^<>\s]+)>  (?P<date>\w.*)")
_HEADING = re.compile(r"\S+ \([^)]+\) .*;")


def authors(root: Path = ROOT, *, least: int = 1) -> dict[str, list[Record]]:
    """Author -> their entries with dates, of everybody with at least `least` different ones.

    None where the folder or its changelogs are not there. Files that cannot be read as text are left out.
    """
    found: dict[str, dict[Example, Record]] = {}
    for path in sorted(root.glob(_FILES)):
        for address, record in _entries(path):
            found.setdefault(name_of(address), {}).setdefault(record.example, record)
    return {name: list(own.values()) for name, own in sorted(found.items()) if len(own) >= least}


def packages(names: Collection[str], root: Path = ROOT) -> list[str]:
    """The packages that have all entries of these authors, each with one that those before it have not."""
    wanted, known, found = set(names), set[Example](), list[str]()
    for path in sorted(root.glob(_FILES)):
        own = {record.example for address, record in _entries(path) if name_of(address) in wanted}
        if own - known:
            found += [path.parent.name] if path.parent.name not in found else []
            known |= own
    return found


def name_of(address: str) -> str:
    """What an author is called: 8 hex digits that stay the same."""
    return hashlib.sha256(f"changelogs {address.lower()}".encode()).hexdigest()[:8]


def _entries(path: Path) -> Iterator[tuple[str, Record]]:
    """(address, entry) of a Debian changelog's entries before `UNTIL`; of any other file there are none."""
    try:
        text = gzip.decompress(path.read_bytes()).decode(errors="replace")
    except (OSError, EOFError, zlib.error):
        return
    heading, body = "", list[str]()
    for line in text.splitlines():
        if _HEADING.match(line):
            heading, body = line, []
        elif heading and (signed := _SIGNED.fullmatch(line)):
            date, told = _seconds(signed["date"]), "\n".join(body).strip("\n") + "\n"
            if date is not None and date < UNTIL.timestamp() and len(told) >= SHORTEST:
                yield signed["address"], Record(Example(f"{heading}\n\n", told), date)
            heading = ""
        else:
            body.append(line)


def _seconds(text: str) -> float | None:
    """Since 1970; None if that is no date."""
    try:
        return parsedate_to_datetime(text.strip()).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
