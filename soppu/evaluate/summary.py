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
    bounded,
    certificate,
    curl,
    gain_kept,
    loss,
    made_by,
    percent,
    printable,
    size,
    smaller,
)

Row = Mapping[str, Any]

_LISTED = 40  # users in the terminal table; of more, the ones that keep least are shown
_WORST = 20
_LONGEST = 32  # characters of a user id
_HEADS = ("user", "examples", "base", "personal", "compressed", "gain kept", "adapter")
_NUMBERS = range(1, 6)
_MARKUP = re.compile(r"([\\`*_\[\]#|~$])")


def text(
    report: Row, *, report_path: str = "", prefect_url: str = "", server_url: str = "", width: int = 0
) -> str:
    """What `make demo` ends with: the users, a line on compression, the verdict, where to look, a curl line.

    Args:
        report_path: of report.html; "" leaves the line out, as for the URLs.
        server_url: of the server; "" takes the one the report says the bundle is served at.
        width: columns of the terminal it is for; 0 is plain text, as in `tables.render`.
    """
    users = report["users"]
    shown = users if len(users) <= _LISTED else sorted(users, key=_kept)[:_WORST]
    lines = [tables.render(_HEADS, map(_cells, shown), right=_NUMBERS, rule=True, width=width)]
    if len(shown) < len(users):
        lines.append(f"{len(users)} users; these {len(shown)} keep the least, the report lists all")
    lines += ["", compression_line(report["compression"]), *_verdict(report["gate"]), ""]
    server_url = server_url or (report["serving"] or {}).get("url", "")
    places = {"report": report_path, "Prefect": prefect_url, "server": server_url}
    lines += [f"{name + ':':9}{place}" for name, place in places.items() if place]
    if asked := curl(report, server_url):
        lines += ["", asked]
    return "\n".join(lines)


def compression_line(made: Row) -> str:
    """Size, error and, where there are shared bases, their bound, in one line."""
    error, part = made["relative_error"], made["certificate"]
    line = (
        f"{made_by(made)}: {size(made['bytes_before'])} -> {size(made['bytes_after'])} ({smaller(made)}),"
        f" relative error {percent(error['rms'])} root mean square, mean {percent(error['mean'])}, worst"
        f" {percent(error['max'])}"
    )
    if not bounded(made):
        return line
    return (
        f"{line}; the shared bases alone leave {percent(part['relative_achieved'])}, none of their ranks less"
        f" than {percent(made['lower_bound'])}"
    )


def user_rows(report: Row) -> list[dict[str, str]]:
    """One dict a user with the terminal table's columns, as Prefect's table artifacts want them."""
    return [dict(zip(_HEADS, _cells(user), strict=True)) for user in report["users"]]


def markdown_users(report: Row) -> str:
    """The table of all users in Markdown."""
    return _markdown(_HEADS, map(_cells, report["users"]), right=_NUMBERS)


def markdown_compression(report: Row) -> str:
    """Compression figures, certificate and verdict in Markdown."""
    made, gate = report["compression"], report["gate"]
    rows = [
        ("bytes", size(made["bytes_before"]), size(made["bytes_after"])),
        ("parameters", f"{made['parameters_before']:,}", f"{made['parameters_after']:,}"),
    ]
    error = made["relative_error"]
    facts = (
        f"{made_by(made)}: {smaller(made)}; relative error {percent(error['rms'])} root mean square, mean"
        f" {percent(error['mean'])}, worst user {percent(error['max'])}."
    )
    verdict = f"Gate: **{'passed' if gate['passed'] else 'refused'}**"
    reasons = [f"- {_mark(reason)}" for reason in gate["reasons"]]
    table = _markdown(("", "adapters", "bundle"), rows, right=(1, 2))
    return "\n\n".join([table, _mark(facts), _mark(certificate(made)), "\n".join([verdict, "", *reasons])])


def _cells(user: Row) -> tuple[str, ...]:
    return (
        _cut(printable(user["id"])),
        f"{user['examples']:,}",
        loss(user["loss_base"]),
        loss(user["loss_personal"]),
        loss(user["loss_compressed"]),
        gain_kept(user),
        printable(user["adapter_id"]),
    )


def _kept(user: Row) -> tuple[bool, float]:
    """Sorts those who keep least first, those without a figure last."""
    known = user["gain_kept"] is not None
    return not known, user["gain_kept"] if known else 0.0


def _verdict(gate: Row) -> list[str]:
    kept = f"all users together keep {percent(gate['mean_gain_kept'])} of their gain"
    if gate["passed"]:
        return [f"gate passed: {kept}"]
    return [f"gate REFUSED: {kept}", *(f"  - {printable(reason)}" for reason in gate["reasons"])]


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int]) -> str:
    numeric = set(right)
    rule = ["--:" if column in numeric else "---" for column in range(len(heads))]
    lines = [heads, rule, *([_mark(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mark(words: str) -> str:
    """Text with nothing that Markdown or HTML would read as markup."""
    return _MARKUP.sub(r"\\\1", escape(printable(words), quote=False))


def _cut(words: str) -> str:
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"
