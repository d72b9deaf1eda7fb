"""`--base MODEL`: adapters whose folders do not say well enough which base model they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from soppu import adapter, models
from soppu.adapter import LoraAdapter

_CACHE = Path(".soppu/models")

BASE = click.option(
    "--base",
    metavar="MODEL",
    default="",
    help="Base model of every DIR: folder, hub id or alias. Writes its name and hash; shapes must fit.",
)


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
