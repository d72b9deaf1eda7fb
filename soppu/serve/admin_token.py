"""The admin token: who knows it may change what a server on this machine serves.

A server that is given none makes one and keeps it in its state folder, readable by its own user only; what
runs as that user beside it reads it there.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from soppu import files

VARIABLE = "SOPPU_ADMIN_TOKEN"
_FILE = "admin-token"


def token_file(state: Path) -> Path:
    """Where a server with this state folder keeps the token it made."""
    return state / _FILE


def read(path: Path | None) -> str:
    """The token in a file; "" if there is none, or no file is named."""
    return path.read_text().strip() if path is not None and path.is_file() else ""


def ensure(path: Path) -> str:
    """The token in a file, made first where there is none. StorageError if the disk refuses it."""
    if not (token := read(path)):
        token = secrets.token_urlsafe(32)
        files.write_text(path, f"{token}\n", mode=0o600)
    else:
        path.chmod(0o600)
    return token
