"""From a row to an example: which columns mean what, and what of a row is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from soppu.data.examples import Example, Record
from soppu.data_settings import COLUMNS, DataConfig
from soppu.errors import DataError

LAYOUTS = (
    "messages [{role, content}]; conversations [{from, value}]; prompt, completion;"
    " instruction, input, output; text"
)
_ROLES = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "model"), "assistant"
)
AUTO = "auto"
_DATES = ("date", "timestamp")
_MILLISECONDS = 1e11  # more is no number of seconds: the year 5138


@dataclass(frozen=True)
class Layout:
    """What columns are called. `user` and `date` are "" for none; `date` is AUTO for the usual names."""

    user: str = "user_id"
    date: str = AUTO
    names: tuple[tuple[str, str], ...] = tuple((name, name) for name in COLUMNS)

    @classmethod
    def of(cls, config: DataConfig) -> Layout:
        """As `data.user_column`, `data.date_column` and `data.columns` say."""
        given = dict(text.partition("=")[::2] for text in config.columns)
        names = tuple((name, given.get(name, name)) for name in COLUMNS)
        return cls(config.user_column, config.date_column, names)

    def column(self, name: str) -> str:
        """What the column of this meaning is called."""
        return dict(self.names)[name]

    def wanted(self) -> frozenset[str]:
        """Every column that could be asked for."""
        return frozenset({self.user, *(name for _, name in self.names), *self.dates()} - {""})

    def dates(self) -> tuple[str, ...]:
        """Where a row's time may be."""
        return _DATES if self.date == AUTO else (self.date,) if self.date else ()


def user_name(row: Any, layout: Layout) -> str | None:
    """The user a row names, as it is written; None if it names none."""
    value = row.get(layout.user) if isinstance(row, Mapping) and layout.user else None
    return value if isinstance(value, str) and value else None


def record(row: Any, where: str, layout: Layout, *, user: bool) -> Record:
    """The example in a row.

    Args:
        row: what the file holds there.
        where: file and line, for messages.
        layout: what columns are called.
        user: whether a row has to name its user.

    Raises:
        DataError: it is of no layout, or a part of it is missing, of another kind, empty or out of order.
    """
    if isinstance(row, DataError):
        raise row
    values = row if isinstance(row, Mapping) else {}
    column = layout.column
    if column("messages") in values and values[column("messages")] is not None:
        example = _chat(values[column("messages")], ("role", "content"), where)
    elif column("conversations") in values and values[column("conversations")] is not None:
        example = _chat(values[column("conversations")], ("from", "value"), where)
    elif column("output") in values and column("instruction") in values:
        example = _alpaca(values, where, layout)
    elif column("text") in values and column("completion") not in values:
        example = Example.text(_text(values, column("text"), where))
    else:
        example = _pair(values, where, layout, user=user)
    if user and user_name(row, layout) is None:
        raise _lacking(values, [layout.user], where, [layout.user])
    return Record(example, _date(values, where, layout))


def _pair(values: Mapping[str, Any], where: str, layout: Layout, *, user: bool) -> Example:
    prompt, completion = layout.column("prompt"), layout.column("completion")
    needed = [*([layout.user] if user else []), prompt, completion]
    missing = [key for key in needed if not isinstance(values.get(key), str)]
    if missing:
        raise _lacking(values, missing, where, needed)
    if not values[completion]:
        who = f"user {values[layout.user]!r}: " if user else ""
        raise DataError(f"{where}: {who}{completion} is empty")
    return Example(values[prompt], values[completion])


def _lacking(values: Mapping[str, Any], missing: list[str], where: str, needed: list[str]) -> DataError:
    wrong = [f"{key} holds {_kind(values[key])}" for key in missing if key in values]
    columns = ", ".join(str(key) for key in values) or "none"
    return DataError(
        f"{where}: lacks the text key {', '.join(missing)}; needed: {', '.join(needed)}; the row has:"
        f" {columns}{'; ' if wrong else ''}{', '.join(wrong)}. Layouts: {LAYOUTS};"
        " data.columns and data.user_column say what they are called here"
    )


def _kind(value: Any) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return "no value"
    return f"a {type(value).__name__}"


def _text(values: Mapping[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    value = values.get(key)
    if may_be_empty and (value is None or _kind(value) == "no value"):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} holds {_kind(value)}, needed: a text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{where}: {key} is empty")
    return value


def _alpaca(values: Mapping[str, Any], where: str, layout: Layout) -> Example:
    asked = _text(values, layout.column("instruction"), where)
    more = _text(values, layout.column("input"), where, may_be_empty=True)
    answer = _text(values, layout.column("output"), where)
    return Example.chat((("user", f"{asked}\n\n{more}" if more else asked), ("assistant", answer)))


def _chat(turns: Any, keys: tuple[str, str], where: str) -> Example:
    """Turns checked: known roles, a system turn first if at all, then user and assistant by turns."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: holds {_kind(turns)}, needed: a list of {{{', '.join(keys)}}}")
    read: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        at = f"{where}: turn {number}"
        role = _ROLES.get(str(turn.get(keys[0])))
        if role is None:
            raise DataError(f"{at}: {keys[0]} is {turn.get(keys[0])!r}, allowed: {', '.join(_ROLES)}")
        content = _text(turn, keys[1], at, may_be_empty=role != "assistant")
        before = read[-1][0] if read else ""
        expected = {"user": "assistant", "assistant": "user", "system": "user"}.get(before, "user")
        if role != expected and not (role == "system" and not before):
            raise DataError(f"{at} is the {role}'s, expected the {expected}'s: user and assistant by turns")
        read.append((role, content))
    while read and read[-1][0] != "assistant":  # nothing is learned of what comes after the last answer
        read.pop()
    if not read:
        raise DataError(f"{where}: the chat holds no turn of the assistant, so nothing to learn")
    return Example.chat(tuple(read))


def _date(values: Mapping[str, Any], where: str, layout: Layout) -> float | None:
    """Seconds since 1970 of a row's time: ISO 8601, or a number of seconds or milliseconds; UTC if unsaid."""
    key = next((name for name in layout.dates() if values.get(name) not in (None, "")), None)
    if key is None:
        return None
    value = values[key]
    try:
        if isinstance(value, str) and not _is_number(value):
            read = datetime.fromisoformat(value.strip())
            return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = float(value)
        if math.isnan(number):
            return None
        return datetime.fromtimestamp(number / 1000 if number > _MILLISECONDS else number, UTC).timestamp()
    except (ValueError, OverflowError, OSError):
        raise DataError(
            f"{where}: {key} = {value!r} is no time; allowed: ISO 8601 (2026-11-28 or 2026-11-28T14:05:00Z),"
            ' seconds or milliseconds since 1970; data.date_column names another column, or none with ""'
        ) from None


def _is_number(text: str) -> bool:
    try:
        return len(text) > 8 and math.isfinite(float(text))  # 20261128 is a day
    except ValueError:
        return False
