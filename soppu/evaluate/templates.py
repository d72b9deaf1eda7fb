"""The pages' templates: every text in them is escaped, and made printable, on its way out."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from soppu.evaluate import wording


def environment(folder: str, **options: Any) -> Environment:
    """The templates in a folder of the package: autoescaped, and an unknown name in one is an error."""
    return Environment(
        loader=PackageLoader("soppu", folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


@functools.cache
def template(name: str) -> Template:
    """A page of this folder: texts are escaped and made printable on their way out."""
    pages = environment("evaluate", finalize=_visible, keep_trailing_newline=True)
    pages.filters |= {**dict(inspect.getmembers(wording, inspect.isfunction)), "grouped": "{:,}".format}
    return pages.get_template(name)


def _visible(value: object) -> object:
    """Control characters of a text made visible, before it is escaped; markup stays as it is."""
    return wording.printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
