"""Who is behind which node: a table that the operator keeps, made when a node's key is registered.

    [members]
    "1125899906842624" = "alice"

The number is what Flower's SuperLink calls the node whose key was registered; a node cannot choose it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from soppu import files
from soppu.errors import ConfigError, RegistryError
from soppu.registry import check_user_id

_HEAD = "# Written by `soppu federation register`: node of a registered key = user.\n[members]\n"


def read(path: str | Path) -> dict[int, str]:
    """Node id -> user.

    Raises:
        ConfigError: there is no such file, it is no TOML, or an entry is not a node and a user of its own.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("members")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; `soppu federation register` makes it with the first node"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a table of members: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: holds no table [members]")
    members: dict[int, str] = {}
    for node, user in table.items():
        if not (node.isascii() and node.isdecimal() and 0 < int(node) < 2**64):
            raise ConfigError(
                f"{path}: {node!r} = {user!r}: the left side is a node's number, up to 2**64 - 1"
            )
        if user in members.values():
            raise ConfigError(f"{path}: user {user!r} has two nodes; a user has one")
        members[int(node)] = _user(user, f"{path}: {node}")
    return members


def write(path: str | Path, members: Mapping[int, str]) -> None:
    """Replace the table, atomically. Raises StorageError."""
    lines = [f'"{node}" = {json.dumps(user)}\n' for node, user in sorted(members.items())]
    files.write_text(Path(path), _HEAD + "".join(lines))


def _user(user: object, where: str) -> str:
    try:
        return check_user_id(user if isinstance(user, str) else "")
    except RegistryError as error:
        raise ConfigError(f"{where}: {error}") from None
