"""The layer number in a module's full name. No heavy import: the report's plots are drawn without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(.*?\.)(\d+)(\..+)")


def split_layer(module: str) -> tuple[str, int, str] | None:
    """What is before the number, the number, and what is after it; None where the name holds no layer.

    model.layers.7.mlp.up_proj is ("model.layers.", 7, ".mlp.up_proj").
    """
    match = _LAYER.fullmatch(module)
    return (match[1], int(match[2]), match[3]) if match else None


def lowest_layer(modules: Iterable[str]) -> int:
    """The lowest number of any of these. ValueError: none of them holds a layer."""
    return min(parts[1] for name in modules if (parts := split_layer(name)))
