"""Fetch a base model into a volume, before what reads it there starts: `python -m deploy.base_model NAME`."""

from __future__ import annotations

from pathlib import Path

import click

from soppu import models
from soppu.errors import SoppuError


@click.command()
@click.argument("name", envvar="MODEL_ID")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("/soppu/models"), show_default=True)
@click.option(
    "--make", "folders", type=click.Path(path_type=Path), multiple=True, help="Folder to make as well."
)
def main(name: str, cache: Path, folders: tuple[Path, ...]) -> None:
    """Fetch, convert and check the base model NAME, or only check it where it is there already."""
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        base = models.resolve(name, cache=cache)
    except (SoppuError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"base model {base.base} in {base.path}")


if __name__ == "__main__":
    main()
