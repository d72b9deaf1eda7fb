"""`soppu users`, `soppu show` and `soppu forget`: look at the registry, and take a user out of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from soppu import tables
from soppu.commands.options import USER, registry_options
from soppu.registry import ForgetReport, HistoryRow, Registry, UserRow

_REGISTRY = registry_options("Where adapters and bundles are kept.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")


@click.command("users")
@_REGISTRY
@_JSON
def users_command(root: str, catalogue: str, as_json: bool) -> None:
    """List every user: current adapter, metrics, and where they are served."""
    registry = _open(root, catalogue)
    rows = registry.users()
    told = registry.told_in([row.adapter_id for row in rows])
    if as_json:
        click.echo(json.dumps([_as_json(row, told) for row in rows], indent=2))
    elif not rows:
        click.echo("no users yet")
    else:
        _print(
            ("USER", "ADAPTER", "SINCE (UTC)", "METRICS", "PUBLISHED"),
            (_user_cells(row, told) for row in rows),
        )


@click.command("show")
@USER
@_REGISTRY
@_JSON
def show_command(user: str, root: str, catalogue: str, as_json: bool) -> None:
    """Show every adapter USER has held, oldest first; * marks the current one."""
    registry = _open(root, catalogue)
    rows = registry.history(user)
    told = registry.told_in([row.adapter_id for row in rows])
    if as_json:
        click.echo(json.dumps([_as_json(row, told) for row in rows], indent=2))
    elif not rows:
        click.echo(f"{user} was forgotten; nothing is kept")
    else:
        heads = ("", "ADAPTER", "SINCE (UTC)", "RUN", "METRICS", "PUBLISHED")
        _print(heads, (_history_cells(row, told) for row in rows))


@click.command("forget")
@USER
@_REGISTRY
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget_command(user: str, root: str, catalogue: str, yes: bool) -> None:
    """Delete USER's history, metrics and adapters. This cannot be undone."""
    registry = _open(root, catalogue)
    held = len({row.adapter_id for row in registry.history(user)})
    if not yes:
        click.confirm(f"Delete the history and the {held} adapter(s) of {user!r}?", abort=True)
    click.echo(_report(registry.forget(user)))


def _open(root: str, catalogue: str) -> Registry:
    return Registry.open(root, catalogue=catalogue, create=False)


def _as_json(row: UserRow | HistoryRow, told: Mapping[str, str]) -> dict[str, Any]:
    return asdict(row) | {"basis_id": told.get(row.adapter_id, "")}


def _shown(row: UserRow | HistoryRow, told: Mapping[str, str]) -> str:
    """The adapter's id, and of a core the basis that it is told in."""
    basis_id = told.get(row.adapter_id)
    return f"{row.adapter_id} in {basis_id}" if basis_id else row.adapter_id


def _user_cells(row: UserRow, told: Mapping[str, str]) -> tuple[str, ...]:
    places = [
        place if adapter_id == row.adapter_id else f"{place} ({adapter_id})"
        for place, adapter_id in row.published.items()
    ]
    return row.user, _shown(row, told), _when(row.at), _metrics(row.metrics), ", ".join(places) or "-"


def _history_cells(row: HistoryRow, told: Mapping[str, str]) -> tuple[str, ...]:
    mark = "*" if row.current else " "
    places = ", ".join(row.published) or "-"
    return mark, _shown(row, told), _when(row.at), row.run or "-", _metrics(row.metrics), places


def _report(report: ForgetReport) -> str:
    lines = [f"forgot {report.user}: {len(report.adapters_removed)} adapter(s) removed"]
    if report.bundles_touched:
        lines.append(f"{len(report.bundles_touched)} bundle(s) hold a core of this user and are marked so")
    lines += [
        f"still served by {one.place} (bundle {one.bundle_id[:12]}): recompress and publish to end that"
        for one in report.publications_still_serving
    ]
    return "\n".join(lines)


def _when(at: str) -> str:
    return at[:19].replace("T", " ")


def _metrics(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in sorted(metrics.items())) or "-"


def _print(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    click.echo(tables.render(heads, rows, width=tables.terminal_width()))
