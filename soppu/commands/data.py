"""`soppu data`: look at users' text before a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from soppu import config as configuration
from soppu import models, tables, user_ids
from soppu.commands.options import CACHE, key_values
from soppu.data import STDLIB, UserData, tokenize
from soppu.data.listing import look
from soppu.data_settings import DataConfig
from soppu.errors import DataError
from soppu.models import BaseModel
from soppu.stages import text

_NUMBERS = (2, 3, 4, 5)


@dataclass(frozen=True)
class _Row:
    user: str  # as people know them
    id: str
    train: int = 0
    validation: int = 0
    held_out: int = 0
    tokens: int | None = None  # None where no model says what a token is
    left_out: str = ""


@click.command("data")
@click.argument("source", required=False)
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="A TOML file with the settings of [data]."
)
@click.option("--set", "given", multiple=True, metavar="KEY=VALUE", help="A key of [data]; repeatable.")
@click.option("--model", default="", help="Count tokens as this base model does; tries its chat template.")
@CACHE
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.pass_context
def data_command(context: click.Context, /, model: str, cache: Path, as_json: bool, **options: Any) -> None:
    """List who has text in SOURCE, how much, and who would be left out of a run, and why.

    SOURCE is what data.source may be: a file, a folder, or stdlib; docs/data.md shows every layout. All of
    it is read, nothing is written. It ends with 1 if somebody's text would end a run.

    \b
      soppu data notes/ --set user_column=author --set min_examples=4
      soppu data --config configs/mine.toml --model smollm2-135m
    """  # noqa: D301
    config = _settings(**options)
    base = models.resolve(model, cache=cache) if model else None
    rows = list(_rows(dataclasses.replace(config, on_small_user="leave-out"), base))
    ignored = [] if config.source == STDLIB else [str(path) for path in look(Path(config.source)).ignored]
    if as_json:
        told = {"source": config.source, "users": [asdict(row) for row in rows], "passed_over": ignored}
        click.echo(json.dumps(told, indent=2))
    else:
        heads = ("USER", "ID", "TRAIN", "VALIDATION", "HELD OUT", "TOKENS", "LEFT OUT BECAUSE")
        click.echo(tables.render(heads, map(_cells, rows), right=_NUMBERS, width=tables.terminal_width()))
        for line in _summary(rows, ignored):
            click.echo(line)
    if config.on_small_user == "error" and any(row.left_out for row in rows):
        context.exit(1)


def _settings(source: str | None, path: Path | None, given: tuple[str, ...]) -> DataConfig:
    values: dict[str, Any] = {} if source is None else {"source": source}
    values |= key_values(given)
    named = {f"data.{key}": value for key, value in values.items()}
    if path:
        return configuration.load(path, named).data
    return configuration.from_dict({"data": values}, source="--set").data


def _rows(config: DataConfig, base: BaseModel | None) -> Iterator[_Row]:
    tokenizer = models.load_tokenizer(base) if base else None
    for user, found in text.everybody(config):
        name = user_ids.name_of(user)
        try:
            if not isinstance(found, UserData):
                raise found
            template = config.chat_template
            tokens = None
            if tokenizer:
                blocks = tokenize(
                    found.examples, tokenizer, max_tokens=config.max_tokens, chat_template=template
                )
                tokens = sum(len(block.ids) for block in blocks)
            counts = (len(found.train), len(found.validation), len(found.heldout))
            yield _Row(name, user, *counts, tokens)
        except DataError as error:
            yield _Row(name, user, left_out=str(error))


def _cells(row: _Row) -> tuple[str, ...]:
    tokens = "-" if row.tokens is None else f"{row.tokens:,}"
    return (
        row.user,
        row.id,
        f"{row.train:,}",
        f"{row.validation:,}",
        f"{row.held_out:,}",
        tokens,
        row.left_out or "-",
    )


def _summary(rows: list[_Row], ignored: list[str]) -> Iterator[str]:
    left = sum(bool(row.left_out) for row in rows)
    yield f"{len(rows):,} users, {left:,} left out"
    if ignored:
        yield f"passed over  {user_ids.some(ignored)}: of no format that is read"
