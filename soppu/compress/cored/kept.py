"""A basis as a bundle keeps it, and how cores that are told in this or another basis stand to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soppu.compress.codec.basis import Bases, Basis
from soppu.compress.numbers.components import unit
from soppu.compress.numbers.quantise import FLOATS, QUANTISERS
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError

_WIDTHS = tuple(sorted((*QUANTISERS, *FLOATS)))


@dataclass(frozen=True, eq=False)
class KeptBasis:
    """The bases of every module in stored numbers, U^ and V^ what a reader makes of them."""

    bases: Mapping[str, Bases]
    sides: Mapping[str, tuple[Tensor, Tensor]]  # U^ (o, k_out), V^ (i, k_in), float32

    @classmethod
    def of(cls, basis: CoreBasis, *, bits: int) -> KeptBasis:
        """Keep a basis at `bits` a number at most, at fewer where nothing is lost by it. O((o + i) k^2)."""
        bases = {name: (_kept(u, bits), _kept(v, bits)) for name, (u, v) in basis.sides.items()}
        return cls(bases, {name: (_matrix(out), _matrix(inn)) for name, (out, inn) in bases.items()})

    @cached_property
    def solve(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Pseudo-inverses (k_out, o) and (k_in, i) of the sides, float64. O((o + i) k^2) each, once."""
        return {
            name: (torch.linalg.pinv(u.double()), torch.linalg.pinv(v.double()))
            for name, (u, v) in self.sides.items()
        }

    def is_exactly(self, basis: CoreBasis) -> bool:
        """Whether a reader gets this basis back bit for bit."""
        return all(
            torch.equal(here, there)
            for name, sides in self.sides.items()
            for here, there in zip(sides, basis.sides[name], strict=True)
        )

    @property
    def numbers(self) -> int:
        """How many numbers the bases hold."""
        return sum(side.rows.numel() for pair in self.bases.values() for side in pair)

    def seen_from(self, basis: CoreBasis) -> dict[str, View]:
        """How cores of a basis are told here, by module. O((o + i) k^2) each.

        Raises:
            AdapterError: the two are of other modules.
        """
        shapes = {name: (len(u), len(v)) for name, (u, v) in self.sides.items()}
        if basis.module_shapes() != shapes:
            odd = min(basis.module_shapes().items() ^ shapes.items())[0]
            raise AdapterError(f"basis {basis.id} and the one that is kept differ in module {odd}")
        return {name: self._view(name, u, v) for name, (u, v) in basis.sides.items()}

    def _view(self, name: str, u: Tensor, v: Tensor) -> View:
        here_u, here_v = self.sides[name]
        if torch.equal(u, here_u) and torch.equal(v, here_v):
            roots = _root(u), _root(v)
            return View((u, v), None, roots, roots)
        solve_u, solve_v = self.solve[name]
        turns = solve_u @ u.double(), solve_v @ v.double()
        both = _root(torch.cat([u, here_u], 1)), _root(torch.cat([v, here_v], 1))
        told = both[0][:, : u.shape[1]], both[1][:, : v.shape[1]]
        kept = both[0][:, u.shape[1] :], both[1][:, v.shape[1] :]
        return View((u, v), turns, told, kept)


@dataclass(frozen=True, eq=False)
class View:
    """One module of a basis, seen from the kept one. Roots are triangular factors: they carry all lengths."""

    sides: tuple[Tensor, Tensor]  # U (o, k_out) and V (i, k_in) that cores are told in
    turns: tuple[Tensor, Tensor] | None  # (k_out^, k_out) and (k_in^, k_in); None where the two are one
    told: tuple[Tensor, Tensor]  # roots of the told side
    kept: tuple[Tensor, Tensor]  # and of the kept one, in the same frame

    def turn(self, cores: Tensor) -> Tensor:
        """The nearest cores (b, k_out^, k_in^) in the kept basis, float64. Cores are (b, k_out, k_in)."""
        if self.turns is None:
            return cores.double()
        return self.turns[0] @ cores.double() @ self.turns[1].mT

    def energy(self, cores: Tensor) -> Tensor:
        """|| U S V^T ||_F^2 (b,) float64. O(k^3) each."""
        return _square(self.told[0] @ cores.double() @ self.told[1].mT)

    def squared_errors(self, cores: Tensor, kept: Tensor) -> Tensor:
        """|| U S V^T - U^ S^ V^^T ||_F^2 (b,), of cores and what is kept; 0 where they are equal."""
        if self.turns is None:
            return self.energy(cores.double() - kept.double())
        there = self.told[0] @ cores.double() @ self.told[1].mT
        return _square(there - self.kept[0] @ kept.double() @ self.kept[1].mT)


def _square(matrices: Tensor) -> Tensor:
    return matrices.square().sum((1, 2))


def _root(side: Tensor) -> Tensor:
    return torch.linalg.qr(side.double(), mode="r").R


def _matrix(basis: Basis) -> Tensor:
    made = basis.matrix()
    assert made is not None  # a side of a CoreBasis has a column
    return made


def _kept(columns: Tensor, bits: int) -> Basis:
    """As few bits as give the same columns back; else `bits`, which then loses something."""
    for width in (width for width in _WIDTHS if width <= bits):
        made = Basis.make(columns, width)
        if torch.equal(_matrix(made), columns):
            return made
    return Basis.make(unit(columns.mT).mT, bits)
