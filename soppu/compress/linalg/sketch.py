"""Passes over many adapters of one module, a batch of users at a time, in memory that does not grow with n d.

Every delta has weight one, D_n / ||D_n||. C_out = sum_n D_n D_n^T / ||D_n||^2, and C_in likewise from D_n^T.

    RangePass    C^1/2 times random numbers: K directions that hold most of C (Halko, Martinsson, Tropp, SIAM
                 Review 53(2), 2011, algorithm 4.1)
    PowerPass    C times these directions: better ones, ordered by energy, and what a bound needs to know
    CorePass     every delta in the coordinates of the directions; what follows happens there (`cores`)
    GrowthPass   directions that the cores lack, for a further CorePass
    ImagePass    C_out or C_in times any block
    GramPass     C_out or C_in itself, for sides of few features or fleets of few columns

A pass takes batches of b deltas with `add` and gives its result with `finish`. CorePass and GrowthPass must
see the users in the same order. A search is a generator, so that searches share passes over a fleet: it
yields (pass, n), the pass it needs and that it is to see every n-th batch, beginning with the first. It goes
on once the pass has seen them, and returns its result.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.cores import Cores

_SMALLEST = torch.finfo(torch.float64).tiny
_SEEDS = 1 << 64
_BLOCKS = 4
AT_A_TIME = 1024  # rows in a product with few columns: with all of them it takes up to twice as long


T = TypeVar("T")


class Pass(Protocol):
    """What looks at all deltas of one module once, a batch at a time and in order."""

    def add(self, batch: Canonical) -> None:
        """Take the next deltas."""
        ...


Asked = tuple[Pass, int]
Steps = Generator[Asked, None, T]


def begun(searches: Mapping[str, Steps[T]], found: dict[str, T]) -> Iterator[tuple[str, Asked]]:
    """The next pass of every search; those that need none have their result put into `found`."""
    for name, search in searches.items():
        try:
            yield name, next(search)
        except StopIteration as end:
            found[name] = end.value


@dataclass(frozen=True, eq=False)
class Ranges:
    """Directions of either side, float64 orthonormal columns: out (o, K), inn (i, K')."""

    out: Tensor
    inn: Tensor

    def cpu(self) -> Ranges:
        """The same in the CPU's memory; no copy where it is there."""
        return Ranges(self.out.cpu(), self.inn.cpu())


@dataclass(frozen=True, eq=False)
class Image:
    """What C does to a block of one side, float64."""

    basis: Tensor  # Q (d, K) orthonormal
    applied: Tensor  # C Q
    applied_probes: Tensor  # C Z
    probes: Tensor  # Z (d, p) in the complement of Q; p = 0 for none


@dataclass(frozen=True, eq=False)
class Power:
    """What a PowerPass found, of the output and of the input side."""

    ranges: Ranges  # an orthonormal basis of C Q, ordered by energy
    images: tuple[Image, Image]  # Q, C Q and the probes' images, for `bounds`
    spectra: tuple[Tensor | None, Tensor | None]  # all eigenvalues of C, ascending; None where not asked for
    total: float  # how many deltas were not zero, the trace of either C


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

    def add(self, batch: Canonical, users: Sequence[int] | None = None) -> None:
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
        exact: of which sides C itself is summed up too, O(d^2 q) a user.
    """

    def __init__(
        self, ranges: Ranges, *, probes: int = 0, seed: int = 0, exact: tuple[bool, bool] = (False, False)
    ) -> None:
        generator = torch.Generator().manual_seed(seed % _SEEDS)
        self._bases = (ranges.out, ranges.inn)
        self._probes = [_complement(basis, probes, generator) for basis in self._bases]
        blocks = [torch.cat(pair, 1) for pair in zip(self._bases, self._probes, strict=True)]
        self._images = [ImagePass(block, out=out) for block, out in zip(blocks, (True, False), strict=True)]
        self._grams = [
            basis.new_zeros((len(basis),) * 2) if whole else None
            for basis, whole in zip(self._bases, exact, strict=True)
        ]
        self._total = 0

    def add(self, batch: Canonical) -> None:
        """Take b deltas."""
        for image, gram, vectors in zip(self._images, self._grams, (batch.X, batch.Y), strict=True):
            image.add(batch)
            if gram is not None:
                columns = rows(vectors * weights(batch.s)[:, None, :].to(vectors)).double()
                gram += columns.mT @ columns
        self._total += int((batch.s[:, :1] > 0).sum())

    def finish(self) -> Power:
        """Better directions, by the SVD of C Q. O((o + i) K^2), and O(d^3) for an exact C."""
        images = [image.finish() for image in self._images]
        out, inn = (
            Image(basis, seen[:, : basis.shape[1]], seen[:, basis.shape[1] :], probes)
            for basis, seen, probes in zip(self._bases, images, self._probes, strict=True)
        )
        ranges = Ranges(*(torch.linalg.svd(side.applied, full_matrices=False)[0] for side in (out, inn)))
        of_out, of_in = (
            None if gram is None else torch.linalg.eigvalsh(gram).clamp(min=0).cpu() for gram in self._grams
        )
        return Power(ranges, (out, inn), (of_out, of_in), float(self._total))


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

    def add(self, batch: Canonical) -> None:
        """Take the next b deltas."""
        b, q = batch.s.shape
        here = slice(self._users, self._users + b)
        if self._made is None:  # whole from the start: parts put together in the end would be there twice
            widths = self._ranges.out.shape[1], self._ranges.inn.shape[1]
            out, inn = (batch.X.new_zeros((*self.size, width)) for width in widths)
            self._made = out, batch.s.new_zeros(self.size), inn
        out, s, inn = self._made
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


class GrowthPass:
    """Accumulates what the basis so far asks for beyond the directions in use. O((o + i) q p) a user.

    With coordinates Z_n (q, p) from `Cores.directions`, sum_n X_n Z_n is a step of the alternation in feature
    space, from p columns. So the ranges become block Krylov spaces of that step.
    """

    def __init__(self, cores: Cores, directions: tuple[Tensor, Tensor]) -> None:
        self._directions, self._eps = directions, torch.finfo(cores.left.dtype).eps
        self._bases = (cores.basis_out, cores.basis_in)
        self._sums = [
            basis.new_zeros((side.shape[2], len(basis)))
            for basis, side in zip(self._bases, directions, strict=True)
        ]
        self._users = 0

    def add(self, batch: Canonical) -> None:
        """Take the next b deltas, in the order of the CorePass."""
        b, q = batch.s.shape
        here = slice(self._users, self._users + b)
        for total, side, vectors in zip(self._sums, self._directions, (batch.X, batch.Y), strict=True):
            _add_product(total, side[here, :q].flatten(0, 1).to(vectors.dtype), rows(vectors))
        self._users += b

    def finish(self) -> Ranges:
        """The new directions only, orthogonal to the present ones; none where nothing is left to find."""
        pairs = zip(self._bases, self._sums, strict=True)
        return Ranges(*(_beyond(basis, total.mT, self._eps) for basis, total in pairs))


class ImagePass:
    """Accumulates C times a block (d, p) float64 of one side, C_out with d = o or C_in. O(d q p) a user."""

    def __init__(self, block: Tensor, *, out: bool) -> None:
        self._block, self._out = block, out
        self._image = torch.zeros_like(block.mT)  # products of few rows and many columns are the faster ones

    def add(self, batch: Canonical) -> None:
        """Take b deltas."""
        vectors = batch.X if self._out else batch.Y
        block, self._image = self._block.to(vectors), self._image.to(vectors.device)
        weight = weights(batch.s).square().to(vectors).reshape(-1, 1)
        for part, w in zip(rows(vectors).split(AT_A_TIME), weight.split(AT_A_TIME), strict=True):
            _add_product(self._image, w * (part @ block), part)

    def finish(self) -> Tensor:
        """C times the block, (d, p) float64."""
        return self._image.mT.to(self._block.device)


class GramPass:
    """Sums up C of one side, d features. O(d^2 q) a user.

    Where all deltas have fewer `columns` these are kept instead, and `finish` gives (columns, columns).
    """

    def __init__(self, features: int, columns: int, *, out: bool) -> None:
        self._few, self._out, self._features = columns < features, out, features
        self._kept: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, batch: Canonical) -> None:
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
