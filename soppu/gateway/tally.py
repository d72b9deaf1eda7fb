"""How many tokens an answer had, read off the answer as it passes; nothing of it is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_EVENT = b"\ndata:"
_LAST = 4096  # bytes of a stream's end, where a server tells the counts
_TOTAL = re.compile(rb'"total_tokens":\s*(\d{1,12})')
_MOST_READ = 1 << 22


class Tally:
    """Counts the events of a stream, one a token; where the last ones tell the counts, those are taken."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._events = 0
        self._end = b"\n"

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""
        held = len(_EVENT) - 1
        joined = self._end[-held:] + chunk
        self._events += joined.count(_EVENT)
        self._end = (self._end + chunk)[-_LAST:]

    @property
    def tokens(self) -> int:
        """Of the prompt, as far as the server told, and of the answer so far."""
        told = _TOTAL.findall(self._end)
        return int(told[-1]) if told else self._prompt + self._events


def of_whole(headers: Mapping[str, str], body: bytes) -> int | None:
    """Tokens of prompt and answer, by a server's headers or its `usage`; None where it does not tell."""
    told = headers.get("x-total-tokens", "")
    if told.isdigit():
        return int(told[:12])
    if len(body) > _MOST_READ:
        return None
    try:
        return int(json.loads(body)["usage"]["total_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
