"""A batch of users who are told in a basis, as a bundle keeps them, and at which error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.cored import rows
from soppu.compress.cored.groups import Group
from soppu.compress.cored.kept import KeptBasis
from soppu.compress.cored.rows import Rows
from soppu.compress.numbers.components import Components


@dataclass(frozen=True, eq=False)
class CodedBatch:
    """b users, numbered from 0, at all modules of the kept basis."""

    parts: list[Components]  # one entry a module
    ranks: Tensor  # (modules, b) int64, of everybody's change told in pairs
    norms: Tensor  # (modules, b) float64
    norm: Tensor  # (b,) float64 of the whole change, at modules that the basis lacks too
    relative_to: Tensor  # (b,) float32 what gains are relative to
    squared: Tensor  # (modules, b) float64 squared errors as stored
    outside: Tensor  # (b,) float64 squared norm of what the basis has no module for


def code(groups: Sequence[Group], kept: KeptBasis, *, users: int, bits: int) -> CodedBatch:
    """Code everybody in the groups, `bits` a number. O(k^3) a user and module where all of it is a core."""
    modules = list(kept.sides)
    energy = torch.zeros(len(modules), users, dtype=torch.float64)
    ranks = torch.zeros(len(modules), users, dtype=torch.int64)
    outside = torch.zeros(users, dtype=torch.float64)
    for group in groups:
        outside[group.places] = group.outside()
        for number, name in enumerate(modules):
            ranks[number, group.places] = torch.tensor(group.ranks(name))
            energy[number, group.places] = group.energy(name)
    norm = (energy.sum(0) + outside).sqrt()
    made = [
        rows.in_order([part for group in groups for part in _rows(group, name, bits)]) for name in modules
    ]
    relative_to = _relative_to(made, norm, users) if bits == rows.EXACT else norm.float()
    parts = [part.relative_to(relative_to) for part in made]
    squared = torch.zeros_like(energy)
    for number, name in enumerate(modules):
        for group in groups:
            squared[number, group.places] = _squared(group, name, parts[number], relative_to)
    return CodedBatch(parts, ranks, energy.sqrt(), norm, relative_to, squared, outside)


def _rows(group: Group, name: str, bits: int) -> list[Rows]:
    """A group's components at a module; of users who do not have the module none."""
    u, v = group.kept.sides[name]
    has = torch.tensor(group.ranks(name)) > 0
    features, ranks = (len(u), len(v)), (u.shape[1], v.shape[1])
    inside = rows.inside(group.cores(name)[has], group.places[has], features=features, bits=bits)
    own = group.own(name).items()
    return [
        inside,
        *(rows.beside(pair, int(group.places[number]), ranks=ranks, bits=bits) for number, pair in own),
    ]


def _relative_to(made: Sequence[Rows], norm: Tensor, users: int) -> Tensor:
    """Of every user the power of 4 next above all their gains: gains are then exact, and at most 1."""
    most = torch.zeros(users, dtype=torch.float64)
    for part in made:
        most.scatter_reduce_(0, part.user, part.gain.abs(), "amax")
    return torch.where(most > 0, rows.power_of_4(most), norm).float()


def _squared(group: Group, name: str, part: Components, relative_to: Tensor) -> Tensor:
    number = torch.full((len(relative_to),), -1)
    number[group.places] = torch.arange(len(group.places))
    here = part.select(number[part.user] >= 0).renumbered(number)
    norm, (u, v) = relative_to[group.places], group.kept.sides[name]
    ranks = (u.shape[1], v.shape[1])
    kept = rows.cores_of(here, norm, ranks=ranks, users=len(group.places))
    return group.squared_errors(name, here, kept, norm)
