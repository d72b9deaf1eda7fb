"""Numbers, sizes and times as the pages say them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from soppu.evaluate import wording as report
from soppu.evaluate.wording import NONE

_WIDTH, _HEIGHT = 120, 28  # of a sparkline


def when(at: str) -> str:
    """A time of the catalogue, to the minute."""
    return f"{at[:10]} {at[11:16]}"


def rate(values: Sequence[float]) -> str:
    """The last of some rates."""
    return f"{values[-1]:.1f} /s" if values else NONE


def visible(text: object) -> str:
    """A text whose control characters can be seen, those that turn its direction among them."""
    told = str(text)
    if told.isprintable():
        return told
    return "".join(one if one.isprintable() or one in "\n\t" else f"\\x{ord(one):02x}" for one in told)


def shown(value: object) -> object:
    """What every value of a template passes through, before it is escaped; markup stays as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _known(say: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: NONE if value is None else say(value)


FILTERS: dict[str, Callable[..., str]] = {
    "nats": report.loss,
    "share": report.percent,
    "named": report.who,
    "size": _known(report.size),
    "took": _known(report.duration),
    "ms": _known(lambda seconds: f"{1000 * seconds:,.0f} ms"),
    "count": _known("{:,.0f}".format),
    "times": _known("{:.1f}×".format),
    "rate": rate,
    "short": lambda text: text[:12],
    "when": when,
    "visible": visible,
}
"""What templates call; losses, shares, sizes and names are worded as in the report."""


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
