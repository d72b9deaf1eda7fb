"""PEFT folders as commands are given them: DIR, USER=DIR, or one folder that holds many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

_CONFIG = "adapter_config.json"  # as soppu.adapter has it, which brings torch along


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """User -> folder. Raises click.BadParameter for a name that is missing or given twice."""
    named: dict[str, Path] = {}
    for text in texts:
        for user, folder in _found(text):
            if not user or user.encode(errors="ignore").decode() != user:
                raise click.BadParameter(f"{text!r} names no user; expected DIR or USER=DIR, in UTF-8")
            if user in named:
                raise click.BadParameter(
                    f"user {user!r} is given twice, {named[user]} and {folder}; tell them apart with USER=DIR"
                )
            named[user] = folder
    return named


def _found(text: str) -> Iterator[tuple[str, Path]]:
    user, separator, path = text.partition("=")
    if separator and not Path(text).is_dir():
        yield user, Path(path)
        return
    folder, name = Path(text), Path(os.path.realpath(text)).name  # Path.resolve fails on a circle of links
    # names with a leading dot are those of folders that somebody is still writing
    inside = sorted(child.parent for child in folder.glob(f"*/{_CONFIG}") if child.parent.name[0] != ".")
    if not inside:
        yield name, folder
    elif (folder / _CONFIG).exists():
        _say_skipped(inside, f"{folder} is an adapter itself")
        yield name, folder
    else:
        rest = sorted({child for child in folder.iterdir() if child.is_dir()} - set(inside))
        _say_skipped(rest, f"no {_CONFIG}, or a name with a leading dot")
        yield from ((child.name, child) for child in inside)


def _say_skipped(folders: Sequence[Path], why: str) -> None:
    if folders:
        click.echo(f"skipped      {', '.join(map(str, folders))}: {why}", err=True)
