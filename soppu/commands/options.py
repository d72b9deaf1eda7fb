"""What several commands are given: PEFT folders, base models, a registry, a file to write."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from soppu import adapter, files, models, user_ids
from soppu.adapter import CONFIG_FILE, LoraAdapter

_Command = TypeVar("_Command", bound=Callable[..., Any])
_CACHE = Path(".soppu/models")

BUNDLE = click.argument("bundle", type=click.Path(dir_okay=False, path_type=Path))
USER = click.argument("user", callback=lambda context, option, value: user_ids.to_id(value))  # or their name
HOST = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
OUT = click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Bundle to write."
)
CACHE = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=_CACHE,
    show_default=True,
    help="Where converted base models are kept.",
)
BASE = click.option(
    "--base",
    metavar="MODEL",
    default="",
    help="Base model of every DIR: folder, hub id or alias. Writes its name and hash; shapes must fit.",
)


def key_values(given: Iterable[str]) -> dict[str, Any]:
    """Settings of `--set KEY=VALUE`: a value is TOML, where it is that, as a number, true, a list; else text.

    Raises:
        click.BadParameter: one without a "=".
    """
    values: dict[str, Any] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"--set {item!r}, expected KEY=VALUE")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


def registry_options(text: str) -> Callable[[_Command], _Command]:
    """`--registry`, explained by `text`, and `--catalogue`, as `root` and `catalogue`."""
    catalogue = click.option(
        "--catalogue", default="", metavar="URL", help="SQLAlchemy URL; default: SQLite inside the registry."
    )
    place: dict[str, Any] = {
        "default": ".soppu/registry",
        "show_default": True,
        "metavar": "PATH/URL",
        "help": text,
    }
    root = click.option("--registry", "root", **place)
    return lambda command: root(catalogue(command))


def reader(base: str) -> Callable[[Path], LoraAdapter]:
    """What reads a PEFT folder; with `base`, as an adapter of that model, which has to fit it.

    Raises:
        ModelError: there is no such model. What it returns raises AdapterError: another hash, or shapes that
            the model does not have.
    """
    if not base:
        return adapter.read
    model = models.resolve(base, cache=_CACHE)
    shapes = models.linear_shapes(models.skeleton(model))

    def read(folder: Path) -> LoraAdapter:
        stamped = adapter.stamped(adapter.read(folder), model.base, who=str(folder))
        adapter.check_shapes(stamped, shapes, who=str(folder))
        return stamped

    return read


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """User -> folder, of DIR, USER=DIR, or one folder that holds many.

    Raises:
        click.BadParameter: a name that is missing, that no folder could have, or that is given twice.
    """
    named: dict[str, Path] = {}
    for text in texts:
        for user, folder in _found(text):
            if not files.is_name(user):
                raise click.BadParameter(
                    f"{text!r} names no user; expected DIR or USER=DIR, USER in UTF-8 and without a slash"
                )
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
    inside = sorted(child.parent for child in folder.glob(f"*/{CONFIG_FILE}") if child.parent.name[0] != ".")
    if not inside:
        yield name, folder
    elif (folder / CONFIG_FILE).exists():
        _say_skipped(inside, f"{folder} is an adapter itself")
        yield name, folder
    else:
        rest = sorted({child for child in folder.iterdir() if child.is_dir()} - set(inside))
        _say_skipped(rest, f"no {CONFIG_FILE}, or a name with a leading dot")
        yield from ((child.name, child) for child in inside)


def _say_skipped(folders: Sequence[Path], why: str) -> None:
    if folders:
        click.echo(f"skipped      {', '.join(map(str, folders))}: {why}", err=True)
