"""`soppu bases`: which bases cores are told in, and which of them is in force."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from soppu import tables
from soppu.commands.options import registry_options
from soppu.registry import BasisRow, Registry


@click.command("bases")
@click.option("--use", metavar="ID", default="", help="Put this basis in force for its base model.")
@registry_options("Where bases are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def bases_command(use: str, root: str, catalogue: str, as_json: bool) -> None:
    """List the bases of a registry, oldest first; * marks those in force, one for each base model.

    A basis says what the cores told in it mean, so none is ever removed. The next compression of a set with
    cores in it takes the basis in force, and carries cores of others over to it.
    """
    registry = Registry.open(root, catalogue=catalogue, create=False)
    if use:
        registry.use_basis(use)
    rows = registry.bases()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif not rows:
        click.echo("no bases yet")
    else:
        heads = ("", "BASIS", "BASE MODEL", "SINCE (UTC)", "CORES")
        click.echo(tables.render(heads, map(_cells, rows), right=(4,), width=tables.terminal_width()))


def _cells(row: BasisRow) -> tuple[str, ...]:
    base = row.base_model or row.base_hash[:12] or "-"
    return "*" if row.in_force else " ", row.basis_id, base, row.at[:19].replace("T", " "), f"{row.cores:,}"
