"""PEFT folders as commands are given them: DIR, USER=DIR, or one folder that holds many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

_CONFIG = "adapter_config.json"  # as soppu.adapter has it, which brings torch along


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """User -> folder. Raises click.BadParameter for a name that is missing or given twice."""
    named: dict[str, Path] = {}
    for text in texts:
        for user, folder in _found(text):
            if not user:
                raise click.BadParameter(f"{text!r} names no user; expected DIR or USER=DIR")
            if user in named:
                raise click.BadParameter(f"user {user!r} is given twice; tell them apart with USER=DIR")
            named[user] = folder
    return named


def _found(text: str) -> Iterator[tuple[str, Path]]:
    user, separator, path = text.partition("=")
    if separator and not Path(text).is_dir():
        yield user, Path(path)
        return
    folder = Path(text)
    # names with a leading dot are those of folders that somebody is still writing
    inside = sorted(child.parent for child in folder.glob(f"*/{_CONFIG}") if child.parent.name[0] != ".")
    if inside and not (folder / _CONFIG).exists():
        yield from ((child.name, child) for child in inside)
    else:
        yield folder.resolve().name, folder
