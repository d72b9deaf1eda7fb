"""The pages' templates: every text in them is escaped, and made printable, on its way out."""

from __future__ import annotations

import functools
import inspect

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from soppu.evaluate import wording


@functools.cache
def template(name: str) -> Template:
    """A page of this folder: texts are escaped and made printable on their way out."""
    environment = Environment(
        loader=PackageLoader("soppu", "evaluate"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {**dict(inspect.getmembers(wording, inspect.isfunction)), "grouped": "{:,}".format}
    return environment.get_template(name)


def _visible(value: object) -> object:
    """Control characters of a text made visible, before it is escaped; markup stays as it is."""
    return wording.printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
