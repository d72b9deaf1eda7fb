"""Basis: the vectors that many users share on one side of a module, as the bundle keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soppu.compress.codec import streams
from soppu.compress.numbers.components import unit
from soppu.compress.numbers.quantise import FLOATS, QUANTISERS, quantise

_WIDTHS = (*QUANTISERS, *FLOATS)
_UNIT = 1e-6  # a length this close to 1 is 1


@dataclass(frozen=True, eq=False)
class Basis:
    """k vectors of d features."""

    width: int  # of the numbers they are kept in; 0 where k = 0
    rows: Tensor  # (k, d) float32, integers up to the width 8, floats from 16 on

    @classmethod
    def make(cls, columns: Tensor, width: int) -> Basis:
        """Quantise the columns of (d, k), each up to its length. O(d k)."""
        if not columns.shape[1]:
            return cls(0, columns.new_zeros((0, columns.shape[0]), dtype=torch.float32))
        rows = quantise(columns.mT.float(), width).contiguous()
        return cls(width, rows if width in FLOATS else rows + 0.0)  # a file keeps no sign of an integer 0

    @property
    def k(self) -> int:
        """How many vectors."""
        return int(self.rows.shape[0])

    def matrix(self) -> Tensor | None:
        """(d, k) float32, columns of length 1, close to orthogonal; None where k = 0.

        Rows of width 32 that have this length already, but for rounding, are taken as they are: so a basis
        that was read from one bundle is the same, bit for bit, in the next.
        """
        if not self.k:
            return None
        made = unit(self.rows)
        if self.width == max(FLOATS):
            kept = (self.rows.double().norm(dim=1) - 1).abs() < _UNIT
            made = torch.where(kept[:, None], self.rows, made)
        return made.mT.contiguous()


def encode(bases: Sequence[Basis]) -> bytes:
    """The numbers of all bases, one stream for each width. O(size)."""
    parts = []
    for width in _WIDTHS:
        rows = [basis.rows.numpy().reshape(-1) for basis in bases if basis.width == width]
        flat = np.concatenate(rows) if rows else np.zeros(0, np.float32)
        if width in FLOATS:
            parts.append(streams.pack_floats(flat, width))
        else:
            parts.append(streams.pack(flat, QUANTISERS[width].limit))
    return streams.join(parts)


def decode(data: bytes, shapes: Sequence[tuple[int, int, int]], *, source: str) -> list[Basis]:
    """Bases from their bytes; `shapes` holds (width, k, d) of each. Raises BundleError. O(size)."""
    parts = streams.split(data, count=len(_WIDTHS), source=source)
    made: dict[int, Iterator[Tensor]] = {}
    for width, part in zip(_WIDTHS, parts, strict=True):
        sizes = [(k, d) for found, k, d in shapes if found == width]
        flat = torch.from_numpy(_numbers(part, sum(k * d for k, d in sizes), width, source))
        pieces = flat.split([k * d for k, d in sizes])
        made[width] = iter([piece.reshape(size) for piece, size in zip(pieces, sizes, strict=True)])
    return [Basis(width, next(made[width]) if width else torch.zeros(0, d)) for width, _, d in shapes]


def _numbers(data: bytes, count: int, width: int, source: str) -> streams.Floats:
    if width in FLOATS:
        return streams.unpack_floats(data, count=count, width=width, source=source)
    limit = QUANTISERS[width].limit
    return streams.unpack(data, count=count, limit=limit, source=source).astype(np.float32)


Bases = tuple[Basis, Basis]  # of the output and of the input side
