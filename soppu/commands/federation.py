"""`soppu federation`: which node is whose, where users' text is on machines of their own."""

from __future__ import annotations

from pathlib import Path

import click

from soppu import files, tables
from soppu.errors import ConfigError, FederationError
from soppu.federation import connection, members
from soppu.registry import check_user_id

_MEMBERS = click.option(
    "--members",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(".soppu/members.toml"),
    show_default=True,
    help="The table of nodes and their users, what federation.members names.",
)
_CONNECTION = click.argument("connection_name", metavar="CONNECTION")
_USER = click.option("--user", required=True, help="Whose node it is.")


@click.group("federation")
def federation_command() -> None:
    """Say which node is whose, where a SuperLink has SuperNodes of its own.

    CONNECTION is the name of the SuperLink in Flower's configuration, FLWR_HOME/config.toml.
    """


@federation_command.command("register")
@click.argument("key", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="KEY.pub")
@_CONNECTION
@_USER
@_MEMBERS
def register_command(key: Path, connection_name: str, user: str, path: Path) -> None:
    """Let the node that holds the key of KEY.pub in, as USER and as nobody else."""
    check_user_id(user)
    with files.exclusive(path.with_suffix(".lock")):
        known = members.read(path) if path.exists() else {}
        if user in known.values():
            raise ConfigError(
                f"user {user!r} has a node in {path} already; first end that with"
                f" `soppu federation unregister --user {user}`"
            )
        node = int(connection.flower("supernode", "register", str(key), connection_name)["node-id"])
        members.write(path, {**known, node: user})
    click.echo(f"node {node} is {user}")


@federation_command.command("unregister")
@_CONNECTION
@_USER
@_MEMBERS
def unregister_command(connection_name: str, user: str, path: Path) -> None:
    """Shut USER's node out; what the registry holds of USER stays, see `soppu forget`."""
    with files.exclusive(path.with_suffix(".lock")):
        known = members.read(path)
        nodes = [node for node, name in known.items() if name == user]
        if not nodes:
            raise ConfigError(f"{path}: no node of user {user!r}; it has {', '.join(sorted(known.values()))}")
        try:
            connection.flower("supernode", "unregister", str(nodes[0]), connection_name)
        except FederationError as error:
            if "not found" not in str(error).lower():  # a SuperLink without a database forgets
                raise
        members.write(path, {node: name for node, name in known.items() if name != user})
    click.echo(f"node {nodes[0]} of {user} is out")


@federation_command.command("members")
@_CONNECTION
@_MEMBERS
def members_command(connection_name: str, path: Path) -> None:
    """List every node that is registered, its user, and whether it is there."""
    known = members.read(path) if path.exists() else {}
    found = {
        int(row["node-id"]): row for row in connection.flower("supernode", "list", connection_name)["nodes"]
    }
    present = [node for node, row in found.items() if row["status"] != "unregistered"]
    rows = [(known.get(node, "-"), str(node), str(found[node]["status"])) for node in present]
    rows += [(user, str(node), "not registered") for node, user in known.items() if node not in present]
    click.echo(tables.render(("USER", "NODE", "STATUS"), sorted(rows), width=tables.terminal_width()))
