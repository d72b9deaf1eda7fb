"""`soppu keys`: who may ask a gateway, and for whom."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from soppu import tables, user_ids
from soppu.commands.options import registry_options
from soppu.gateway.keys import Key, KeyStore
from soppu.registry import Registry

_REGISTRY = registry_options("The registry whose catalogue keeps the keys.")


@click.group("keys")
def keys_command() -> None:
    """Make, list and revoke the keys that a gateway takes."""


@keys_command.command("create")
@click.argument("user", required=False)
@click.option("--admin", is_flag=True, help="A key for the gateway's figures; it reaches no model.")
@click.option("--note", default="", help="What it is for; shown in the list.")
@click.option(
    "--days", type=click.FloatRange(0, min_open=True), help="Good for so long; else until it is revoked."
)
@_REGISTRY
def create_command(
    user: str | None, *, admin: bool, note: str, days: float | None, root: str, catalogue: str
) -> None:
    """Print a new key of USER, once: it is kept as a hash, and cannot be shown again."""
    if admin == (user is not None):
        raise click.UsageError("name a USER, or --admin")
    registry = Registry.open(root, catalogue=catalogue, create=False)
    who = user_ids.to_id(user) if user is not None else ""
    text, key = KeyStore(registry.catalogue).create(who, admin=admin, note=note, days=days)
    if who and not registry.addresses(who):
        click.echo(
            f"{who} is served nowhere yet: the key reaches what users without an adapter get", err=True
        )
    click.echo(f"{key.id}  {'admin' if admin else key.user}", err=True)
    click.echo(text)


@keys_command.command("list")
@click.option("--user", default="", help="Only this user's.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@_REGISTRY
def list_command(user: str, *, as_json: bool, root: str, catalogue: str) -> None:
    """List every key by its id; the keys themselves are known to their owners alone."""
    keys = _open(root, catalogue).every(user_ids.to_id(user) if user else "")
    if as_json:
        click.echo(json.dumps([asdict(key) for key in keys], indent=2))
    elif not keys:
        click.echo("no keys yet")
    else:
        heads = ("KEY", "USER", "SINCE (UTC)", "UNTIL", "NOTE")
        click.echo(tables.render(heads, map(_cells, keys), width=tables.terminal_width()))


@keys_command.command("revoke")
@click.argument("key", required=False)
@click.option("--user", default="", help="All keys of this user.")
@_REGISTRY
def revoke_command(key: str | None, *, user: str, root: str, catalogue: str) -> None:
    """Revoke KEY, by its id: gateways that run refuse it from the next request on."""
    if bool(key) == bool(user):
        raise click.UsageError("name a KEY, or --user USER")
    store = _open(root, catalogue)
    count = store.revoke(user=user_ids.to_id(user)) if user else store.revoke(key_id=key or "")
    click.echo(f"revoked {count}" if count else "was revoked already")


def _open(root: str, catalogue: str) -> KeyStore:
    return KeyStore(Registry.open(root, catalogue=catalogue, create=False).catalogue)


def _cells(key: Key) -> tuple[str, ...]:
    until = (
        f"revoked {_when(key.revoked_at)}"
        if key.revoked_at
        else _when(key.expires_at)
        if key.expires_at
        else "-"
    )
    return key.id, "(admin)" if key.admin else key.user, _when(key.created_at), until, key.note or "-"


def _when(at: str | None) -> str:
    return (at or "")[:19].replace("T", " ")
