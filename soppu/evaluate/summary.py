"""A report in a terminal, and as Markdown for an orchestrator's artifacts.

User ids come from outside: no control character of theirs reaches the terminal, no markup the Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from soppu import tables
from soppu.evaluate.wording import (
    adapter,
    bounded,
    certificate,
    curl,
    errors,
    gain_kept,
    gains,
    loss,
    lost,
    made_by,
    nats,
    percent,
    printable,
    refit,
    served,
    shortened,
    size,
    smaller,
    who,
)

Row = Mapping[str, Any]

_LISTED = 40  # users in the terminal table; of more, the ones that keep least are shown
_WORST = 20
_LONGEST = 32  # characters of a user id
_HEADS = [
    *("user", "examples", "base", "shared", "personal", "compressed"),
    *("over shared", "gain kept", "served", "adapter"),
]
_NUMBERS = range(1, 8)
_MARKUP = re.compile(r"([\\`*_\[\]#|~$])")


def text(report: Row, *, report_path: str = "", prefect_url: str = "", width: int = 0) -> str:
    """What `make demo` ends with: the users, a line on compression, the verdict, where to look, a curl line.

    Args:
        report_path: of report.html; "" leaves the line out, as for the URL.
        width: columns of the terminal it is for; 0 is plain text, as in `tables.render`.
    """
    users, gate = report["users"], report["gate"]
    shown = users
    if len(users) > _LISTED:
        gained = [user for user in users if user["gain_kept"] is not None and user["served"] != "base"]
        shown = sorted(gained, key=lambda user: user["gain_kept"])[:_WORST] or users[:_WORST]
    lines = [tables.render(_HEADS, map(_cells, shown), right=_NUMBERS, rule=True, width=width)]
    if len(shown) < len(users):
        lines.append(f"{len(users)} users; these {len(shown)} keep the least, the report lists all")
    lines += ["", f"served: {served(report)}", *gains(report), *filter(None, [lost(report)])]
    verdict = f"gate {'passed' if gate['passed'] else 'REFUSED'}"
    kept = f"all users together keep {percent(gate['mean_gain_kept'])} of their gain"
    lines += ["", compression_line(report["compression"]), f"{verdict}: {kept}"]
    lines += [*(f"  - {printable(reason)}" for reason in gate["reasons"]), *map(printable, refit(report)), ""]
    server = (report["serving"] or {}).get("url", "")
    places = {"report": report_path, "Prefect": prefect_url, "server": server}
    lines += [f"{name + ':':9}{place}" for name, place in places.items() if place]
    lines += [
        f"NOT published to {one['name']} ({one['url']}): {printable(one['error'])}"
        for one in report["targets"]
        if one["error"]
    ]
    if asked := curl(report):
        lines += ["", asked]
    return "\n".join(lines)


def compression_line(made: Row) -> str:
    """Size, error and, where there are shared bases, their bound, in one line."""
    sizes = f"{size(made['bytes_before'])} -> {size(made['bytes_after'])} ({smaller(made)})"
    line = f"{made_by(made)}: {sizes}, relative error {errors(made)}"
    if not bounded(made):
        return line
    return (
        f"{line}; the shared bases alone leave {percent(made['certificate']['relative_achieved'])}, none of"
        f" their ranks less than {percent(made['lower_bound'])}"
    )


def markdown_users(report: Row) -> str:
    """The table of all users in Markdown, and in sentences what was won."""
    table = markdown(_HEADS, map(_cells, report["users"]), right=_NUMBERS)
    said = [f"Served: {served(report)}.", *gains(report), *filter(None, [lost(report)])]
    return "\n\n".join([table, *map(_mark, said)])


def markdown_compression(report: Row) -> str:
    """Compression figures, certificate and verdict in Markdown."""
    made, gate = report["compression"], report["gate"]
    rows = [
        ("bytes", size(made["bytes_before"]), size(made["bytes_after"])),
        ("parameters", f"{made['parameters_before']:,}", f"{made['parameters_after']:,}"),
    ]
    facts = f"{made_by(made)}: {smaller(made)}; relative error {errors(made)}."
    verdict = f"Gate: **{'passed' if gate['passed'] else 'refused'}**"
    reasons = [f"- {_mark(reason)}" for reason in gate["reasons"]]
    reasons += ["", *map(_mark, refit(report))]
    table = markdown(("", "adapters", "bundle"), rows, right=(1, 2))
    return "\n\n".join([table, _mark(facts), _mark(certificate(made)), "\n".join([verdict, "", *reasons])])


def _cells(user: Row) -> tuple[str, ...]:
    return (
        shortened(who(user["id"]), limit=_LONGEST),
        f"{user['examples']:,}",
        *(loss(user[f"loss_{name}"]) for name in ("base", "shared", "personal", "compressed")),
        nats((user["gain_over_shared"] or {}).get("mean")),
        gain_kept(user),
        user["served"],
        printable(adapter(user)),
    )


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int]) -> str:
    """A table in Markdown, with nothing in its cells that would be read as markup."""
    numeric = set(right)
    rule = ["--:" if column in numeric else "---" for column in range(len(heads))]
    lines = [heads, rule, *([_mark(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mark(words: str) -> str:
    """Text with nothing that Markdown or HTML would read as markup."""
    return _MARKUP.sub(r"\\\1", escape(printable(words), quote=False))
