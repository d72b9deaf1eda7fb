"""What a user may be called, and how that is written as an id: percent-escaped, and readable back.

An id is 1 to 128 ASCII letters, digits, ".", "_", "-" and escapes "%40"; every other character of a name is
the escapes of its UTF-8 bytes: "alice@example.com" can be a folder, and is not read as "user@version".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import quote, unquote

from soppu.errors import DataError

LONGEST = 128
ALLOWED = (
    f"1 to {LONGEST} of the letters A-Z a-z, digits 0-9, '.', '_' and '-', not beginning with '.';"
    " any other character as its percent escape: alice%40example.com"
)
_SHAPE = re.compile(rf"(?!\.)(?=.{{1,{LONGEST}}}\Z)(?:[A-Za-z0-9._-]|%[0-9A-F]{{2}})+")
_REFUSED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, invisible, surrogate, line and paragraph separator


def is_id(text: str) -> bool:
    """Whether this is an id as it stands: of the allowed characters, and escaped only where it has to be."""
    if not _SHAPE.fullmatch(text):
        return False
    try:
        name = unquote(text, errors="strict")
        return "%" not in text or bool(name.strip()) and _escape(name) == text
    except (UnicodeDecodeError, DataError):
        return False


def to_id(name: str) -> str:
    """The id of a user of this name; an id is its own. Names that differ only in Unicode's form are one.

    Raises:
        DataError: it is blank, or too long once escaped, or holds a control character, which is named.
    """
    if is_id(name):
        return name
    user_id = _escape(name)
    if not name.strip():
        raise DataError(f"user name {name!r} is empty")
    if len(user_id) > LONGEST:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise DataError(
            f"user name {shown!r}: {len(user_id)} characters as an id, allowed: {LONGEST};"
            " characters other than A-Z a-z 0-9 . _ - take three for each byte"
        )
    return user_id


def name_of(user_id: str) -> str:
    """The name behind an id, for people to read; what is no id is given back as it is."""
    return unquote(user_id) if "%" in user_id and is_id(user_id) else user_id


def spellings(name: str) -> tuple[str, ...]:
    """What may be meant by a name: what it says, and the id of a user who is called so."""
    try:
        return tuple(dict.fromkeys((name, to_id(name))))
    except DataError:
        return (name,)


def some(names: Iterable[str], *, limit: int = 20) -> str:
    """Names for a message: all, or the first `limit` and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _escape(name: str) -> str:
    for place, character in enumerate(name):
        if unicodedata.category(character) in _REFUSED:
            said = unicodedata.name(character, "a control character")
            raise DataError(
                f"user name {name[:40]!r}: U+{ord(character):04X} ({said}) at {place} cannot be in a name"
            )
    escaped = quote(unicodedata.normalize("NFC", name), safe="").replace("~", "%7E")
    return f"%2E{escaped[1:]}" if escaped.startswith(".") else escaped
