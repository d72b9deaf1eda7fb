"""A core on the wire: its numbers in one tensor. A tensor each costs more in headers than in numbers.

core.numbers    float32 (n,): of every module, in the order of their names, S row by row; then, where
                users have ranks of their own, A and B of every module

What a user sends are the numbers that are their own; the start that the server sends has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.cores.around import with_own
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError

NUMBERS = "core.numbers"
FORM = "core"  # what a reply says of itself


def to_state(core: CoreAdapter, *, common: int = 0) -> dict[str, Tensor]:
    """Core -> {NUMBERS: float32 (n,)}. Ranks of its own are of every module, or of none.

    Args:
        common: rows and columns of every S that are left out, the first ones.
    """
    tensors = {name: _free(tensor, name, common) for name, tensor in core.tensors().items()}
    flat = [tensors[name].detach().float().reshape(-1) for name in _order(core.cores, bool(core.own))]
    return {NUMBERS: torch.cat(flat)}


def from_state(
    state: Mapping[str, Tensor],
    basis: CoreBasis,
    *,
    own_rank: int,
    who: str,
    start: CoreAdapter | None = None,
) -> CoreInBasis:
    """Numbers -> the core beside its basis, with everything checked that a sender could get wrong.

    Args:
        start: a core that has what is in common, where the numbers are those of a user alone.

    Raises:
        AdapterError: another tensor, other than as many numbers, another kind of them, NaN or Inf.
    """
    shapes = _shapes(basis, own_rank, free=start is not None)
    _check(state, sum(map(math.prod, shapes.values())), who)
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = state[NUMBERS].split(sizes)
    tensors = {name: part.reshape(shapes[name]).clone() for name, part in zip(shapes, parts, strict=True)}
    cores = {name: tensors[f"{name}.core"] for name in basis.sides}
    if start:
        cores = {name: with_own(start.cores[name], free) for name, free in cores.items()}
    pairs = {name: LoraPair(tensors[f"{name}.own_A"], tensors[f"{name}.own_B"]) for name in _owners(shapes)}
    core = CoreAdapter(basis.id, cores, pairs, basis.base_model, basis.base_hash, basis.fan_in_fan_out)
    return CoreInBasis(core, basis, who=who)


def _free(tensor: Tensor, name: str, common: int) -> Tensor:
    return tensor[common:, common:] if common and name.endswith(".core") else tensor


def _check(state: Mapping[str, Tensor], count: int, who: str) -> None:
    if state.keys() != {NUMBERS}:
        raise AdapterError(f"{who}: a core of {', '.join(sorted(state)) or 'nothing'}; expected {NUMBERS}")
    tensor = state[NUMBERS]
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (count,):
        raise AdapterError(
            f"{who}: {NUMBERS}: {tensor.dtype} {tuple(tensor.shape)}, the basis says torch.float32 {(count,)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{who}: {NUMBERS}: holds NaN or Inf")


def numbers(basis: CoreBasis, *, own_rank: int) -> int:
    """How many of a core are a user's own."""
    return sum(map(math.prod, _shapes(basis, own_rank, free=True).values()))


def _order(modules: Mapping[str, object], own: bool) -> Iterator[str]:
    names = sorted(modules)
    yield from (f"{name}.core" for name in names)
    yield from (f"{name}.own_{side}" for name in names for side in "AB" if own)


def _shapes(basis: CoreBasis, own_rank: int, *, free: bool) -> dict[str, tuple[int, int]]:
    """Every tensor of a core, or of what is a user's own of it, in the order of the wire."""
    cores = basis.free_shapes() if free else basis.core_shapes()
    shapes = {f"{name}.core": shape for name, shape in cores.items()}
    for name, (o, i) in basis.module_shapes().items() if own_rank else ():
        shapes |= {f"{name}.own_A": (own_rank, i), f"{name}.own_B": (o, own_rank)}
    return {name: shapes[name] for name in _order(basis.sides, bool(own_rank))}


def _owners(shapes: Mapping[str, object]) -> list[str]:
    return [name.removesuffix(".own_A") for name in shapes if name.endswith(".own_A")]
