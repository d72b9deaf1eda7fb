"""From singular components to integers: the coding of a batch of users at one module, and its exact error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.numbers.components import Components, Side, ordinals, spread, unit
from soppu.compress.numbers.quantise import quantise, quantise_coords, scale_of


@dataclass(frozen=True, eq=False)
class SideCoder:
    """Codes one side of components against a basis.

    Attributes:
        basis: (d, k) as stored, or None.
        solve: (k, d) least-squares coordinates of a vector are `vector @ solve.T`.
    """

    basis: Tensor | None
    solve: Tensor | None

    @classmethod
    def make(cls, basis: Tensor | None, *, whitener: Whitener | None = None) -> SideCoder:
        """A coder for `basis` (d, k), its errors weighed by the whitener. O(d k^2), O(d^2 k) whitened."""
        if basis is None:
            return cls(None, None)
        seen = basis if whitener is None else whitener.forward(basis.mT).mT
        solve = least_squares(seen)
        return cls(basis, (solve if whitener is None else whitener.forward(solve)).to(basis.dtype))

    def code(self, x: Tensor, coords_width: Tensor, own_width: Tensor) -> Side:
        """Code rows of `x` (m, d) in the forms asked for. O(m d k)."""
        coords = self._coords(x, coords_width)
        rest = x if self.basis is None else x.clone()
        if self.basis is not None:
            rest[coords_width > 0] -= coords @ self.basis.mT
        has = own_width > 0
        own = _each_width(rest[has], own_width[has], quantise)
        beta = has.float()
        both = has & (coords_width > 0)
        beta[both] = scale_of(rest[both], unit(own[coords_width[has] > 0])).half().float()
        return Side(coords_width, own_width, torch.zeros(len(x), dtype=torch.int64), coords, own, beta)

    def axes(self, axis: Tensor) -> Side:
        """Sides that are basis vectors, at the places `axis` (m,)."""
        assert self.basis is not None
        features, k = self.basis.shape
        return Side.of_axes(axis, features=features, k=k)

    def _coords(self, x: Tensor, width: Tensor) -> Tensor:
        coded = width > 0
        if self.solve is None:
            return x.new_zeros((0, 0))
        return _each_width(x[coded] @ self.solve.mT, width[coded], quantise_coords)


def least_squares(basis: Tensor) -> Tensor:
    """(k, d) float64, the pseudo-inverse of a basis (d, k): what a vector has along its columns. O(d k^2)."""
    seen = basis.mT.double()
    return torch.linalg.pinv(seen @ seen.mT, hermitian=True) @ seen


def _each_width(x: Tensor, widths: Tensor, by: Callable[[Tensor, int], Tensor]) -> Tensor:
    made = torch.zeros_like(x, dtype=torch.float32)
    for width in widths.unique().tolist():
        rows = widths == width
        made[rows] = by(x[rows], width)
    return made


def with_gains(
    factors: Canonical,
    parts: Components,
    bases: tuple[Tensor | None, Tensor | None],
    *,
    norm: Tensor,
    whitener: Whitener | None = None,
) -> tuple[Components, Tensor]:
    """Least-squares gains for the components of a batch, rounded as stored, and every user's squared error.

    The gains of a user solve (L L^T * R R^T) g = diag(L D R^T), L (c, o) and R (c, i) the sides; all of it in
    float64. O(b c (o + i)(r + c)), for a side in coordinates alone O(b (d r + c r + c^2) k).

    Args:
        factors: of the b users, who are numbered 0 to b - 1 in `parts`.
        bases: output and input basis as stored.
        norm: (b,) what gains are relative to.
        whitener: weighs errors on the input side.
    """
    left = _products(parts, parts.left, bases[0], factors.X)
    right = _products(parts, parts.right, bases[1], factors.Y, whitener=whitener)
    gram = left.gram * right.gram
    aim = (left.seen * factors.s.double()[:, None, :] * right.seen).sum(-1)
    empty = torch.diagonal(gram, dim1=-2, dim2=-1) == 0
    solved = torch.linalg.lstsq(gram + torch.diag_embed(empty.double()), aim[..., None]).solution[..., 0]
    scale = norm.double().clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    exact = _has_floats(parts)
    kept = (solved / scale).to(torch.float32 if exact else torch.float16)
    gain = kept.double() * scale
    square = factors.s.double().square().sum(-1) - 2 * (gain * aim).sum(-1)
    square = square + ((gram @ gain[..., None])[..., 0] * gain).sum(-1)
    return replace(parts, gain=kept.float()[parts.user, ordinals(parts.user)]), square.clamp(min=0)


@dataclass(frozen=True, eq=False)
class _Products:
    """Of one side L (b, c, d) float64: gram = L L^T (b, c, c), and seen = L X (b, c, r)."""

    gram: Tensor
    seen: Tensor


def _products(
    parts: Components, side: Side, basis: Tensor | None, columns: Tensor, *, whitener: Whitener | None = None
) -> _Products:
    """One side times itself and times `columns` (b, d, r). Coordinates never grow to size d."""
    users = len(columns)
    if basis is None or bool((side.own_width > 0).any()):
        rows = spread(side.vectors(basis), parts.user, users=users)
        rows = rows if whitener is None else whitener.forward(rows)
        return _Products(rows @ rows.mT, rows @ columns.double())
    spanned = basis.mT.double() if whitener is None else whitener.forward(basis.mT)
    rows = spread(side.coordinates(len(spanned)), parts.user, users=users)
    seen = (columns.mT.flatten(0, 1).double() @ spanned.mT).unflatten(0, (users, -1)).mT
    return _Products(rows @ (spanned @ spanned.mT) @ rows.mT, rows @ seen)


def _has_floats(parts: Components) -> bool:
    """Whether any number is kept as a float, and gains are then to be as exact."""
    sides = (parts.left, parts.right)
    return any(bool((width >= 16).any()) for side in sides for width in (side.coords_width, side.own_width))


@dataclass(frozen=True, eq=False)
class CoreCoder:
    """Codes the deltas of one module inside one pair of bases.

    Attributes:
        left: output basis.
        right: input basis.
        width: of the coordinates.
        diagonal: whether cores are diagonal, as JD-Diag makes them.
        whitener: weighs errors on the input side.
    """

    left: SideCoder
    right: SideCoder
    width: int
    diagonal: bool
    whitener: Whitener | None

    def code(self, factors: Canonical, norm: Tensor, price: Tensor) -> tuple[Components, Tensor]:
        """The components of b users and their squared errors in the metric of the fit, (b,). `price` is not
        used.
        """
        present = factors.s[:, 0] > 0
        parts = self._diagonal(present) if self.diagonal else self._core(factors, present)
        bases = (self.left.basis, self.right.basis)
        return with_gains(factors, parts, bases, norm=norm, whitener=self.whitener)

    def _core(self, factors: Canonical, present: Tensor) -> Components:
        assert self.left.solve is not None and self.right.solve is not None
        x = factors.X.mT @ self.left.solve.mT
        stored = factors.Y.mT if self.whitener is None else self.whitener.back(factors.Y.mT).to(x.dtype)
        y = stored @ self.right.solve.mT
        k_out, k_in, rank = x.shape[2], y.shape[2], int((factors.s > 0).sum(1).max())
        cores = (x * factors.s[:, :, None]).mT @ y
        if k_out * k_in <= (k_out + k_in) * min(rank, k_out, k_in):
            return self._full(cores, present)
        p, sigma, qt = torch.linalg.svd(cores.double(), full_matrices=False)
        keep = (torch.arange(sigma.shape[1]) < (factors.s > 0).sum(1)[:, None]) & (sigma > 0)
        user = torch.arange(len(cores))[:, None].expand_as(keep)[keep]
        left, right = self._coords(p.mT[keep].float(), self.left), self._coords(qt[keep].float(), self.right)
        return Components(user, torch.zeros(len(user)), left, right)

    def _full(self, cores: Tensor, present: Tensor) -> Components:
        users, k_out, _ = cores.shape
        keep = present.repeat_interleave(k_out)
        user = torch.arange(users).repeat_interleave(k_out)
        rows = self._coords(cores.reshape(users * k_out, -1)[keep], self.right)
        axes = self.left.axes(torch.arange(k_out).repeat(users)[keep])
        return Components(user[keep], torch.zeros(int(keep.sum())), axes, rows)

    def _diagonal(self, present: Tensor) -> Components:
        assert self.left.basis is not None
        k = self.left.basis.shape[1]
        user = torch.arange(len(present)).repeat_interleave(k)
        keep = present[user]
        axis = torch.arange(k).repeat(len(present))[keep]
        return Components(user[keep], torch.zeros(len(axis)), self.left.axes(axis), self.right.axes(axis))

    def _coords(self, rows: Tensor, side: SideCoder) -> Side:
        """Rows (m, k), brought to a largest entry of 1: the gain takes the scale up."""
        assert side.basis is not None
        scaled = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        width = torch.full((len(rows),), self.width, dtype=torch.uint8)
        return Side.of_coordinates(quantise_coords(scaled, self.width), width, features=len(side.basis))
