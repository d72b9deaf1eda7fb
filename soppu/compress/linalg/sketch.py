"""Passes over many adapters of one module, a batch of users at a time, in memory that does not grow with n d.

Every delta has weight one, D_n / ||D_n||. C_out = sum_n D_n D_n^T / ||D_n||^2, and C_in likewise from D_n^T.

    RangePass    C^1/2 times random numbers: K directions that hold most of C (Halko, Martinsson, Tropp, SIAM
                 Review 53(2), 2011, algorithm 4.1)
    PowerPass    C times these directions: better ones, ordered by energy, and what a bound needs to know
    CorePass     every delta in the coordinates of the directions; what follows happens there (`cores`)
    GrowthPass   directions that the cores lack, for a further CorePass
    ImagePass    C_out or C_in times any block
    GramPass     C_out or C_in itself, for sides of few features or fleets of few columns

A pass takes batches with `add` and gives its result with `finish`. CorePass and GrowthPass must see the users
in the same order. Batches are `canonical` forms, or anything else with orthonormal X, Y and s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from soppu.compress.linalg.bounds import Image
from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.cores import Cores, Directions

__all__ = [
    "Canonical",
    "CorePass",
    "GramPass",
    "GrowthPass",
    "ImagePass",
    "Power",
    "PowerPass",
    "RangePass",
    "Ranges",
    "canonical",
]

_SMALLEST = torch.finfo(torch.float64).tiny
_SEEDS = 1 << 64
_BLOCKS = 4
AT_A_TIME = 1024  # rows in a product with few columns: with all of them it takes up to twice as long


class Deltas(Protocol):
    """Deltas D_n = X_n diag(s_n) Y_n^T: X (b, o, q) and Y (b, i, q) orthonormal where s (b, q) is not 0."""

    @property
    def X(self) -> Tensor: ...
    @property
    def s(self) -> Tensor: ...
    @property
    def Y(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Ranges:
    """Directions of either side, float64 orthonormal columns: out (o, K), inn (i, K')."""

    out: Tensor
    inn: Tensor


@dataclass(frozen=True, eq=False)
class Power:
    """What a PowerPass found.

    Attributes:
        ranges: an orthonormal basis of C Q on either side, ordered by energy.
        values_out: (K,) singular values of C_out Q, descending: the j-th is at most the j-th eigenvalue of
            C_out, and at least the j-th Ritz value of Q.
        values_in: (K',) likewise.
        image_out: Q, C_out Q and the probes' images, for `bounds`.
        image_in: likewise.
        total: how many deltas were not zero, the trace of either C.
    """

    ranges: Ranges
    values_out: Tensor
    values_in: Tensor
    image_out: Image
    image_in: Image
    total: float


class RangePass:
    """Accumulates sum_n X_n diag(s_n) Omega_n / ||D_n|| and the same of Y_n. O((o + i) q K) a user.

    Omega_n is drawn by a counter-based generator keyed by (seed, number of the user). So the sum does not
    depend on how users are cut into batches nor, where numbers are given, on their order; its rounding does.

    Args:
        width: K asked for; at most o, i and the columns of all deltas are given.
        seed: of the random numbers; 64 bits of it are used.
    """

    def __init__(
        self, o: int, i: int, *, width: int, seed: int, device: torch.device | str | None = None
    ) -> None:
        self._out = torch.zeros((width, o), device=device)
        self._inn = torch.zeros((width, i), device=device)
        self._seed = seed % _SEEDS
        self._users = self._most = self._columns = 0

    def add(self, batch: Deltas, users: Sequence[int] | None = None) -> None:
        """Take b deltas; `users` are their numbers, by default the next b."""
        b, q = batch.s.shape
        numbers = range(self._users, self._users + b) if users is None else users
        self._out, self._inn = self._out.to(batch.X), self._inn.to(batch.X)  # device and type of the deltas
        shape = (q, 2, len(self._out))
        drawn = np.stack([_normal(self._seed, number, shape) for number in numbers])
        omega = torch.from_numpy(drawn).to(batch.s) * weights(batch.s)[:, :, None, None].to(batch.s)
        _add_product(self._out, omega[:, :, 0].flatten(0, 1), rows(batch.X))
        _add_product(self._inn, omega[:, :, 1].flatten(0, 1), rows(batch.Y))
        self._users += b
        self._most = max(self._most, q)
        self._columns += int((batch.s > 0).sum())

    @property
    def size(self) -> tuple[int, int]:
        """(n, q): deltas seen, and the most columns one of them has."""
        return self._users, self._most

    def finish(self) -> Ranges:
        """The directions. O((o + i) K^2)."""
        return Ranges(_orth(self._out.mT, self._columns), _orth(self._inn.mT, self._columns))


class PowerPass:
    """Accumulates C_out Q_out and C_in Q_in. O((o + i) q (K + probes)) a user.

    Args:
        probes: random columns in the complement of Q that ride along, for a sharper bound.
    """

    def __init__(self, ranges: Ranges, *, probes: int = 0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed % _SEEDS)
        self._bases = (ranges.out, ranges.inn)
        self._probes = tuple(_complement(basis, probes, generator) for basis in self._bases)
        self._applied = tuple(
            _Applied(torch.cat(pair, 1)) for pair in zip(self._bases, self._probes, strict=True)
        )
        self._total = 0

    def add(self, batch: Deltas) -> None:
        """Take b deltas."""
        squared = weights(batch.s).square()
        for side, vectors in zip(self._applied, (batch.X, batch.Y), strict=True):
            side.add(vectors, squared)
        self._total += int((batch.s[:, :1] > 0).sum())

    def finish(self) -> Power:
        """Better directions, by the singular value decomposition of C Q. O((o + i) K^2)."""
        out, inn = (
            Image(basis, side.image[: basis.shape[1]].mT, probes, side.image[basis.shape[1] :].mT)
            for basis, side, probes in zip(self._bases, self._applied, self._probes, strict=True)
        )
        left, values_out, _ = torch.linalg.svd(out.applied, full_matrices=False)
        right, values_in, _ = torch.linalg.svd(inn.applied, full_matrices=False)
        return Power(Ranges(left, right), values_out, values_in, out, inn, float(self._total))


class CorePass:
    """Keeps diag(w_n) X_n^T Q_out, w_n = s_n / ||s_n||, and Y_n^T Q_in of every user. O((o + i) q K) a user.

    Args:
        ranges: Q_out and Q_in.
        size: (n, q), how many users there are and the most columns one has; fewer are padded with zeros.
    """

    def __init__(self, ranges: Ranges, size: tuple[int, int]) -> None:
        self._ranges, self.size = ranges, size
        self._made: tuple[Tensor, Tensor, Tensor] | None = None
        self._users = 0

    def add(self, batch: Deltas) -> None:
        """Take the next b deltas."""
        b, q = batch.s.shape
        here = slice(self._users, self._users + b)
        # made whole from the start: parts put together in the end would be there twice
        out, s, inn = self._made = self._made or self._room(batch)
        _coordinates(batch.X, self._ranges.out, out[here, :q])
        _coordinates(batch.Y, self._ranges.inn, inn[here, :q])
        s[here, :q] = batch.s
        self._users += b

    def finish(self) -> Cores:
        """All cores."""
        assert self._made is not None and self._users == self.size[0]
        left, s, right = self._made
        weight = weights(s)
        left *= weight.to(left)[:, :, None]
        return Cores(self._ranges.out, self._ranges.inn, left, right, weight, _norms(s))

    def _room(self, batch: Deltas) -> tuple[Tensor, Tensor, Tensor]:
        n, q = self.size
        widths = self._ranges.out.shape[1], self._ranges.inn.shape[1]
        out, inn = (batch.X.new_zeros((n, q, width)) for width in widths)
        return out, batch.s.new_zeros(self.size), inn


class GrowthPass:
    """Accumulates what the basis so far asks for beyond the directions in use. O((o + i) q p) a user.

    With coordinates Z_n (q, p) from `Cores.directions`, sum_n X_n Z_n is a step of the alternation in feature
    space, from p columns. So the ranges become block Krylov spaces of that step.
    """

    def __init__(self, cores: Cores, directions: Directions) -> None:
        self._cores, self._directions = cores, directions
        self._out = cores.basis_out.new_zeros((directions.out.shape[2], len(cores.basis_out)))
        self._inn = cores.basis_in.new_zeros((directions.inn.shape[2], len(cores.basis_in)))
        self._users = 0

    def add(self, batch: Deltas) -> None:
        """Take the next b deltas, in the order of the CorePass."""
        b, q = batch.s.shape
        here = slice(self._users, self._users + b)
        out, inn = (side[here, :q].flatten(0, 1) for side in (self._directions.out, self._directions.inn))
        _add_product(self._out, out.to(batch.X.dtype), rows(batch.X))
        _add_product(self._inn, inn.to(batch.Y.dtype), rows(batch.Y))
        self._users += b

    def finish(self) -> Ranges:
        """The new directions only, orthogonal to the present ones; none where nothing is left to find."""
        eps = torch.finfo(self._cores.left.dtype).eps
        return Ranges(
            _beyond(self._cores.basis_out, self._out.mT, eps),
            _beyond(self._cores.basis_in, self._inn.mT, eps),
        )


class ImagePass:
    """Accumulates C times a block of one side. O(d q p) a user.

    Args:
        block: (d, p) float64.
        out: whether C is C_out, with d = o, or C_in.
    """

    def __init__(self, block: Tensor, *, out: bool) -> None:
        self._applied, self._out = _Applied(block), out

    def add(self, batch: Deltas) -> None:
        """Take b deltas."""
        self._applied.add(batch.X if self._out else batch.Y, weights(batch.s).square())

    def finish(self) -> Tensor:
        """C times the block, (d, p) float64."""
        return self._applied.image.mT.to(self._applied.block.device)


class GramPass:
    """Sums up C of one side, or where the deltas have fewer columns than features keeps them all. O(d^2 q) a
    user.

    Args:
        features: d.
        columns: how many the deltas have; where fewer than d, `finish` gives (columns, columns).
        out: whether C is C_out.
    """

    def __init__(self, features: int, columns: int, *, out: bool) -> None:
        self._few, self._out, self._features = columns < features, out, features
        self._kept: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, batch: Deltas) -> None:
        """Take b deltas."""
        found = rows(batch.X if self._out else batch.Y)
        weight = weights(batch.s).to(found).reshape(-1, 1)
        if self._few:
            self._kept.append((found * weight)[weight[:, 0] > 0])
            return
        if self._gram is None:
            self._gram = found.new_zeros((self._features, self._features), dtype=torch.float64)
        self._gram += found.mT @ (weight.square() * found)

    def finish(self) -> Tensor:
        """A matrix with the eigenvalues of C that are not zero, up to the round-off of the deltas."""
        if self._few:
            used = torch.cat(self._kept)
            return used @ used.mT
        assert self._gram is not None
        return self._gram


class _Applied:
    """C times a block (d, p) of one side, as it accumulates where the deltas are: image (p, d)."""

    def __init__(self, block: Tensor) -> None:
        self.block = block
        self.image = torch.zeros_like(block.mT)  # products of few rows and many columns are the faster ones

    def add(self, vectors: Tensor, squared: Tensor) -> None:
        block, self.image = self.block.to(vectors), self.image.to(vectors.device)
        weight = squared.to(vectors).reshape(-1, 1)
        for part, w in zip(rows(vectors).split(AT_A_TIME), weight.split(AT_A_TIME), strict=True):
            _add_product(self.image, w * (part @ block), part)


def rows(vectors: Tensor) -> Tensor:
    """Columns of all users (b, d, q) as the rows of one matrix (b q, d); a view of a canonical form."""
    return vectors.mT.reshape(-1, vectors.shape[1])


def weights(s: Tensor) -> Tensor:
    """Singular values (b, q) scaled to length one, float64; zero for a zero delta."""
    return s.double() / _norms(s).clamp(min=_SMALLEST)[:, None]


def _norms(s: Tensor) -> Tensor:
    return torch.linalg.vector_norm(s.double(), dim=1)


def _coordinates(vectors: Tensor, basis: Tensor, target: Tensor) -> None:
    """Set target (b, q, K) to X_n^T Q of every user, from X (b, d, q) and Q (d, K)."""
    basis, q = basis.to(vectors.dtype), vectors.shape[2]
    step = max(AT_A_TIME // max(q, 1), 1)
    for part, made in zip(vectors.split(step), target.split(step), strict=True):
        made.copy_((rows(part) @ basis).unflatten(0, (len(part), q)))


def _add_product(target: Tensor, factor: Tensor, columns: Tensor) -> None:
    """Target (p, d) += factor^T columns, from factor (m, p) and columns (m, d), those of all users as `rows`.

    A product of few rows and many columns is a third faster than its transpose, and in blocks of columns at
    once faster by another tenth or two.
    """
    blocks = _BLOCKS if columns.shape[1] % _BLOCKS == 0 else 1
    side_by_side = columns.unflatten(1, (blocks, -1)).transpose(0, 1)
    made = factor.mT.expand(blocks, -1, -1) @ side_by_side
    target.unflatten(1, (blocks, -1)).transpose(0, 1).add_(made)


def _normal(seed: int, user: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that depend on seed and user alone; a wider `shape[0]` begins with the same."""
    key = np.array([seed, user % _SEEDS], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)


def _complement(basis: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn((len(basis), probes), generator=generator, dtype=torch.float64).to(basis)
    return drawn - basis @ (basis.mT @ drawn)


def _orth(sketch: Tensor, columns: int) -> Tensor:
    k = min(*sketch.shape, max(columns, 1))
    return torch.linalg.qr(sketch[:, :k].double()).Q


def _beyond(basis: Tensor, found: Tensor, eps: float) -> Tensor:
    """Orthonormal directions of `found` (d, p) outside `basis` (d, K), without those that are round-off."""
    size = torch.linalg.vector_norm(found, dim=0).max() if found.numel() else found.new_zeros(())
    rest = found - basis @ (basis.mT @ found)
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = left[:, : len(basis) - basis.shape[1]][:, values[: len(basis) - basis.shape[1]] > 16 * eps * size]
    kept = kept - basis @ (basis.mT @ kept)  # a second time, for orthogonality to the last digits
    return torch.linalg.qr(kept).Q if kept.shape[1] else kept
