"""tradeoff.html: a comparison of arms as one page that needs nothing but itself.

It holds what tradeoff.json, its file of texts and report.json hold. Of many users not
everything is on it, and it says what is not.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from soppu import files
from soppu.errors import ReportError
from soppu.evaluate import schema as reports
from soppu.evaluate.templates import template
from soppu.evaluate.tradeoff import fronts, schema, table
from soppu.evaluate.tradeoff.schema import Row, TextLine, Tradeoff
from soppu.evaluate.wording import who
from soppu.tradeoff_settings import METRICS, PERSONAL

USERS = 1000  # on the page, those first whom compression cost most
READ = 100  # of these, how many with texts
EXAMPLES = 3  # texts of one user
_LONGEST = 1500  # characters of one text


@dataclass
class User:
    """A user with every arm."""

    id: str
    rows: list[Row] = field(default_factory=list)
    cost: float | None = None  # nats a token, of the bundle that costs most, over their own adapter
    cost_arm: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)  # their row of the report
    examples: list[TextLine] = field(default_factory=list)


def write_page(run_folder: Path) -> Path:
    """Write tradeoff.html of a run's newest comparison, atomically; gives its path.

    Raises:
        ReportError: the comparison, its texts or the run's report are not whole, or the texts are gone.
        StorageError: the disk refused.
    """
    found = schema.read(run_folder / schema.FILE)
    shown = users_of(found)
    report = _report(run_folder)
    for user in shown:
        user.told = report.get(user.id, {})
    readable = {user.id: user for user in shown[:READ]}
    for line in _texts(run_folder, found.texts, readable):
        readable[line.user].examples.append(line)
    path = run_folder / schema.PAGE
    files.write_text(path, page(found, shown))
    return path


def page(found: Tradeoff, users: Sequence[User]) -> str:
    """The whole page. The same comparison gives the same text."""
    script = resources("soppu.evaluate.tradeoff").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    heads, cells = table.arm_cells(found)
    return template("tradeoff/page.html.jinja").render(
        found=found,
        box=fronts,
        panels=fronts.panels(found),
        heads=heads,
        cells=cells,
        said=list(table.said(found)),
        metrics=[name for name in METRICS if any(name in arm.intervals for arm in found.arms)],
        users=users[:USERS],
        everybody=len(users),
        read=READ,
        examples=EXAMPLES,
        longest=_LONGEST,
        script=script,
        digest=digest,
        score=table.told,
        won=table.gain,
        name=who,
    )


def users_of(found: Tradeoff) -> list[User]:
    """Everybody, those first whom compression cost most; last, by name, those of whom that is not known."""
    bundles = {arm.name for arm in found.arms if arm.kind == "bundle"}
    everybody: dict[str, User] = {}
    for row in found.rows:
        everybody.setdefault(row.user, User(row.user)).rows.append(row)
    for user in everybody.values():
        losses = {row.arm: row.loss for row in user.rows if row.loss is not None}
        compressed = {arm: loss for arm, loss in losses.items() if arm in bundles}
        if compressed and PERSONAL in losses:
            user.cost_arm = max(compressed, key=lambda arm: compressed[arm])
            user.cost = compressed[user.cost_arm] - losses[PERSONAL]
    return sorted(everybody.values(), key=lambda one: (one.cost is None, -(one.cost or 0.0), one.id))


def _report(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Users' rows of report.json; none before there is a report."""
    path = folder / "report.json"
    if not path.exists():
        return {}
    told = files.read_object(path, error=ReportError, cure="run the pipeline's report stage again")
    return {user["id"]: user for user in reports.check(told, source=str(path))["users"]}


def _texts(folder: Path, name: str, users: Collection[str]) -> Iterator[TextLine]:
    """The first few lines of each of these users. One line is held at a time."""
    path = folder / name
    if not files.is_name(name):
        raise ReportError(f"{folder / schema.FILE}: texts = {name!r}, allowed: the name of a file beside it")
    seen: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                line = _line(text, f"{path}: line {number}")
                seen[line.user] = seen.get(line.user, 0) + 1
                if line.user in users and seen[line.user] <= EXAMPLES:
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read: {error}; `soppu evaluate` writes it anew") from None


def _line(text: str, source: str) -> TextLine:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{source}: not JSON: {error}") from None
    return schema.check_line(value, source=source)
