"""Adapter names on the wire: which are refused, what "alice@0f3c" asks for, and how they look in a header."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from string import punctuation
from urllib.parse import quote

from soppu.serve.refusals import failed, invalid

LOCAL = "local"
_ELSEWHERE = ("hub", "s3", "pbase")  # LoRAX's other sources of adapters
_MAX_LENGTH = 512  # "adapters/USER/HASH" has to fit, USER a folder's name of any length
_WHOLE_ID = re.compile(r"[0-9a-f]{64}")
_REFUSED = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line and paragraph separators


def check_name(name: str, *, what: str) -> None:
    """Refuse what must not go into headers, logs and files: RequestError 422 naming the character."""
    for position, character in enumerate(name):
        if unicodedata.category(character) in _REFUSED:
            raise invalid(f"`{what}` holds the control character U+{ord(character):04X} at {position}")
    if len(name) > _MAX_LENGTH:
        raise invalid(f"`{what}` must have at most {_MAX_LENGTH} characters. Given: {len(name)}")


def adapter_folder(name: str, content_hash: str) -> str:
    """What a server calls the folder that keeps an adapter: no two names or contents share one."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{content_hash[:16]}"


def check_source(source: str, *, adapter_id: str) -> None:
    """Refuse an adapter that is to come from elsewhere: RequestError 424. "" is local."""
    if source in ("", LOCAL) or not adapter_id and source in _ELSEWHERE:
        return
    why = f"Invalid source {source!r} when downloading adapter {adapter_id!r}"
    if source in _ELSEWHERE:
        why += "; this server fetches nothing: put it into its folder of adapters, and ask with 'local'"
    raise failed(why)


def split_version(name: str) -> tuple[str, str]:
    """User and beginning of a bundle id: "alice@0f3c" is ("alice", "0f3c"), "alice" is ("alice", "")."""
    user, at, prefix = name.rpartition("@")
    return (user, prefix) if at and prefix else (name, "")


def find_version(name: str, bundle_ids: Iterable[str]) -> tuple[str, str, list[str]]:
    """The two parts of `name`, and the bundles it may mean; it means one only where there is just one."""
    user, prefix = split_version(name)
    return user, prefix, [bundle_id for bundle_id in bundle_ids if prefix and bundle_id.startswith(prefix)]


def check_servable(name: str, bundle_ids: Iterable[str]) -> None:
    """Refuse a name that nobody could ask for, or that would be asked for instead of a user's version.

    Raises:
        RequestError: 422 saying why: it is empty, no request may carry it, or it reads "user@<bundle>" of one
            of the bundles that are loaded, `bundle_ids`.
    """
    if not name:
        raise invalid("`name` cannot be empty: that is the base model")
    check_name(name, what="name")
    user, prefix, matches = find_version(name, bundle_ids)
    if matches or _WHOLE_ID.fullmatch(prefix):
        raise invalid(
            f"`name` {name!r} asks for {user!r} in bundle {prefix[:12]}; take one without that ending"
        )


def header_value(text: str) -> str:
    """`text` as a header value: printable ASCII stays, everything else is percent-encoded UTF-8."""
    return quote(text, safe=punctuation + " ")
