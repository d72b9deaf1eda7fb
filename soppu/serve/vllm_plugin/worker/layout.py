"""Where the modules of a bundle lie in vLLM's layers: packed (q, k and v in one) and sharded over ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from soppu.errors import BundleError


@dataclass(frozen=True)
class Part:
    """One module of the base model inside a layer, as this rank holds it."""

    module: str  # its name in the base model
    shape: tuple[int, int]  # (o, i) of the whole module
    first: int  # first of the module's o rows that this rank holds
    size: int  # how many it holds
    at: int  # the column of the layer's output where they begin


@dataclass(frozen=True)
class Linear:
    """One linear layer of the engine, as this rank holds it."""

    name: str  # in the engine
    first: int  # first of the input features that this rank holds
    size: int  # how many it holds
    out: int  # columns of this rank's output
    parts: tuple[Part, ...]  # the modules in it, in the order of their columns


def adapted(linears: Sequence[Linear], shapes: Mapping[str, tuple[int, int]], *, who: str) -> list[Linear]:
    """The layers that the modules in `shapes` lie in, each with those parts alone, sorted by name.

    Raises:
        BundleError: a module that no layer holds, or that has another shape there; the message names it.
    """
    held = {part.module: part for linear in linears for part in linear.parts}
    for name, shape in shapes.items():
        if name not in held:
            raise BundleError(
                f"{who}: {name}: the engine has no such linear layer; it has {len(held)}, among them"
                f" {', '.join(sorted(held)[:3])}"
            )
        if held[name].shape != shape:
            raise BundleError(f"{who}: {name}: shape {shape}, the base model has {held[name].shape}")
    chosen = (replace(line, parts=tuple(p for p in line.parts if p.module in shapes)) for line in linears)
    return sorted((line for line in chosen if line.parts), key=lambda line: line.name)


def check_within(modules: Collection[str], linears: Sequence[Linear], *, who: str) -> None:
    """Refuse modules outside the layers that were prepared when the server started. Raises BundleError."""
    prepared = {part.module for linear in linears for part in linear.parts}
    if missing := sorted(set(modules) - prepared):
        raise BundleError(
            f"{who}: {missing[0]} is not among the {len(prepared)} modules this server was started with;"
            " restart it with SOPPU_BUNDLE naming this bundle"
        )
