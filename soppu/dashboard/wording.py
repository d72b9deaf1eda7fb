"""Numbers, sizes and times as the pages say them."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from soppu import user_ids

NONE = "–"
FILTERS = ("nats", "share", "size", "when", "ms", "count", "rate", "short", "named", "visible", "took")
_WIDTH, _HEIGHT = 120, 28  # of a sparkline


def nats(value: float | None) -> str:
    """Nats a token."""
    return NONE if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return NONE if value is None else f"{100 * value:.1f} %"


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def when(at: str) -> str:
    """A time of the catalogue, to the minute."""
    return f"{at[:10]} {at[11:16]}"


def ms(seconds: float | None) -> str:
    """Milliseconds."""
    return NONE if seconds is None else f"{1000 * seconds:,.0f} ms"


def count(value: float | None) -> str:
    """A whole number."""
    return NONE if value is None else f"{value:,.0f}"


def rate(values: Sequence[float]) -> str:
    """The last of some rates."""
    return f"{values[-1]:.1f} /s" if values else NONE


def took(seconds: float | None) -> str:
    """A duration."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"


def short(text: str) -> str:
    """The beginning of a hash."""
    return text[:12]


def named(user: str) -> str:
    """A user's name for people: what the id stands for."""
    return user_ids.name_of(user)


def visible(text: object) -> str:
    """A text whose control characters can be seen."""
    return "".join(one if one.isprintable() or one in "\n\t" else f"\\x{ord(one):02x}" for one in str(text))


def sparkline(values: Sequence[float], label: str) -> Markup:
    """A line of up to some dozens of values, from 0 to their largest, with words for who cannot see it."""
    if len(values) < 2:
        return Markup("")
    top = max(*values, 1e-9)
    step = _WIDTH / (len(values) - 1)
    points = " ".join(
        f"{n * step:.1f},{_HEIGHT - 2 - (_HEIGHT - 4) * v / top:.1f}" for n, v in enumerate(values)
    )
    return Markup(
        '<svg class="spark" role="img" viewBox="0 0 {w} {h}" width="{w}" height="{h}" aria-label="{label}">'
        '<polyline points="{points}"/></svg>'
    ).format(w=_WIDTH, h=_HEIGHT, label=label, points=points)
