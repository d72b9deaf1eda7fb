"""`soppu resolve`: by what id a user is asked for, and where."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from soppu import tables
from soppu.commands.options import USER, registry_options
from soppu.errors import RegistryError
from soppu.registry import Registry


@click.command("resolve")
@USER
@click.option("--url", default="", help="Of this server alone.")
@registry_options("Where publications are recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def resolve_command(user: str, url: str, root: str, catalogue: str, as_json: bool) -> None:
    """Say where USER is served now, and which adapter_id a request has to name there.

    A LoRAX server knows adapters by path alone and users not at all: who calls it asks here first. With --url
    and without --json the id alone is printed.
    """
    places = Registry.open(root, catalogue=catalogue, create=False).resolve(user)
    chosen = [one for one in places if url.rstrip("/") in ("", one.url.rstrip("/"))]
    if not chosen:
        where = f"at {url}" if url else "anywhere"
        others = ", ".join(one.url for one in places) or "nowhere"
        raise RegistryError(f"user {user!r} is not served {where}; served at: {others}")
    if as_json:
        click.echo(json.dumps([asdict(one) for one in chosen], indent=2))
    elif url:
        click.echo(chosen[0].asked_as)
    else:
        rows = [(one.target, one.url, one.asked_as, one.bundle_id[:12]) for one in chosen]
        click.echo(
            tables.render(("TARGET", "URL", "ADAPTER_ID", "BUNDLE"), rows, width=tables.terminal_width())
        )
