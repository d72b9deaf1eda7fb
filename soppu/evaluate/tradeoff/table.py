"""A comparison as a table, for a terminal and as Markdown: a line an arm, or a line a user and arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from soppu import tables
from soppu.evaluate.summary import markdown
from soppu.evaluate.tradeoff.schema import Arm, Difference, Row, Tradeoff
from soppu.evaluate.wording import printable, shortened, size, who
from soppu.tradeoff_settings import METRICS

_NONE = "-"
_LONGEST = 32  # characters of a user id
_SHARES = ("exact_match", "valid")
_Column = tuple[str, str, Callable[[Any], str]]  # head, field, how a value is told


def text(found: Tradeoff, *, users: bool = False, width: int = 0) -> str:
    """What `soppu evaluate` prints: the arms, with `users` every user with each, and what was left out."""
    parts = [_render(found.arms, _of_arms(found), width)]
    if users:
        parts.append(_render(found.rows, _of_rows(found), width))
    return "\n\n".join([*parts, "\n".join(said(found))])


def markdown_table(found: Tradeoff) -> str:
    """The arms in Markdown, for an orchestrator's artifacts."""
    columns = _filled(found.arms, _of_arms(found))
    table = markdown([head for head, _, _ in columns], _cells(found.arms, columns), right=_right(columns))
    return "\n\n".join([table, *map(printable, said(found))])


def arm_cells(found: Tradeoff) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line of cells an arm, the name first."""
    columns = _filled(found.arms, _of_arms(found))
    return [head for head, _, _ in columns], list(_cells(found.arms, columns))


def told(metric: str, value: float | None) -> str:
    """A score as the table tells it."""
    return _NONE if value is None else next(tell for _, name, tell in _scores() if name == metric)(value)


def gain(won: Difference) -> str:
    """What is won, with its interval where there is one."""
    return _interval(won.mean, won.low, won.high)


def _of_arms(found: Tradeoff) -> list[_Column]:
    return [
        ("arm", "name", printable),
        *_scores(),
        ("over base", "intervals", _gain),
        *_times(),
        ("first ms", "first_token_ms_p50", "{:,.0f}".format),
        ("tokens/s", "tokens_s", "{:,.1f}".format),
        ("memory", "memory_bytes", size),
        ("on disk", "bytes", size),
        ("a user", "bytes_per_user", size),
        ("error", "relative_error", "{:.3f}".format),
    ]


def _of_rows(found: Tradeoff) -> list[_Column]:
    return [
        ("user", "user", lambda user: shortened(who(user), limit=_LONGEST)),
        ("arm", "arm", printable),
        *_scores(),
        ("over base", "interval", lambda won: _interval(won.mean, won.low, won.high)),
        *_times(),
        ("bytes", "bytes", size),
    ]


def _scores() -> list[_Column]:
    def teller(metric: str) -> Callable[[float], str]:
        if metric == "loss":
            return "{:.4f}".format
        if metric == "pass_at_1":  # one problem of 164 is 0.6 %
            return "{:.1%}".format
        return "{:.0%}".format if metric in _SHARES else "{:.1f}".format

    return [(metric.replace("_", " "), metric, teller(metric)) for metric in METRICS]


def _times() -> list[_Column]:
    return [(f"p{n} ms", f"latency_ms_p{n}", "{:,.0f}".format) for n in (50, 99)]


def _render(rows: Sequence[Arm] | Sequence[Row], columns: list[_Column], width: int) -> str:
    shown = _filled(rows, columns)
    heads = [head for head, _, _ in shown]
    return tables.render(heads, _cells(rows, shown), right=_right(shown), rule=True, width=width)


def _filled(rows: Sequence[Arm] | Sequence[Row], columns: list[_Column]) -> list[_Column]:
    """The columns in which there is anything."""
    return [column for column in columns if any(_value(row, column[1]) is not None for row in rows)]


def _cells(rows: Sequence[Arm] | Sequence[Row], columns: list[_Column]) -> Iterator[list[str]]:
    for row in rows:
        values = ((_value(row, name), told) for _, name, told in columns)
        yield [_NONE if value is None else told(value) for value, told in values]


def _value(row: Arm | Row, name: str) -> Any:
    value = getattr(row, name, None)
    return None if value == {} else value


def _right(columns: list[_Column]) -> list[int]:
    return [number for number, (_, name, _) in enumerate(columns) if name not in ("name", "arm", "user")]


def _gain(intervals: Any) -> str:
    """What is won in loss, the one quality that every arm has."""
    won = intervals.get("loss") or next(iter(intervals.values()))
    return _interval(won.mean, won.low, won.high)


def _interval(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:+.3f}" if low is None or high is None else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def said(found: Tradeoff) -> Iterator[str]:
    """Over what the means are, how text was made, and what was left out and why."""
    users = len({row.user for row in found.rows})
    how = found.generation
    yield f"means over {users} users; loss: nats a token of held-out text, what it wins with a 95 % interval"
    yield (
        f"text: up to {how.prompts_per_user} prompts a user, greedy, {how.max_new_tokens} tokens,"
        f" {how.batch} together; ms: one prompt alone, {how.timed_tokens} tokens"
    )
    if how.problems:
        yield f"pass at 1: {how.problems} problems of HumanEval, each completed once an arm, users in turn"
    for metric, why in found.left_out.items():
        yield f"left out: {metric}: {why}"
