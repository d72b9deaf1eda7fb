"""What a server's log says about its end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_TAIL_LINES = 15
# The last line of a traceback, behind a log's prefix or not.
_CAUSE = re.compile(r"(?:^|\] )[\w.]*(?:Error|Exception): ")


def tail(lines: Sequence[str]) -> str:
    """The last lines, and before them the first error if that came earlier."""
    number = _first_error(lines)
    first = [lines[number], "[...]"] if number < len(lines) - _TAIL_LINES else []
    return "\n".join([*first, *lines[-_TAIL_LINES:]])


def cause(lines: Sequence[str]) -> str:
    """One line: the first error of the log, else its last words; "" where it is empty."""
    said = [line for raw in lines for line in _unwrapped(raw).splitlines() if line.strip()]
    number = _first_error(said)
    return (said[number] if number < len(said) else said[-1] if said else "").strip()


def _first_error(lines: Sequence[str]) -> int:
    """Where the first error stands; the number of lines if there is none."""
    return next((number for number, line in enumerate(lines) if _CAUSE.search(line)), len(lines))


def _unwrapped(line: str) -> str:
    """The message of a line that is a JSON object, as LoRAX's launcher writes them; else the line."""
    try:
        entry = json.loads(line)
        return str(entry["fields"]["message"])
    except (ValueError, KeyError, TypeError):
        return line
