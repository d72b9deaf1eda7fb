"""Adapter names on the wire: which are refused, and how they look in a header."""

from __future__ import annotations

import unicodedata
from string import punctuation
from urllib.parse import quote

from soppu.serve.refusals import invalid

_MAX_LENGTH = 256
_REFUSED = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line and paragraph separators


def check_name(name: str, *, what: str) -> None:
    """Refuse what must not go into headers, logs and files: RequestError 422 naming the character."""
    for position, character in enumerate(name):
        if unicodedata.category(character) in _REFUSED:
            raise invalid(f"`{what}` holds the control character U+{ord(character):04X} at {position}")
    if len(name) > _MAX_LENGTH:
        raise invalid(f"`{what}` must have at most {_MAX_LENGTH} characters. Given: {len(name)}")


def header_value(text: str) -> str:
    """`text` as a header value: printable ASCII stays, everything else is percent-encoded UTF-8."""
    return quote(text, safe=punctuation + " ")
