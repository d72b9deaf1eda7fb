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
    """Codes one side of components against a basis, if there is one."""

    basis: Tensor | None  # (d, k) as stored
    solve: Tensor | None  # (k, d): the least-squares coordinates of a vector are `vector @ solve.T`

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
        coords, rest = x.new_zeros((0, 0)), x
        inside, has = coords_width > 0, own_width > 0
        if self.basis is not None and self.solve is not None:
            coords = _each_width(x[inside] @ self.solve.mT, coords_width[inside], quantise_coords)
            rest = x.clone()
            rest[inside] -= coords @ self.basis.mT
        own = _each_width(rest[has], own_width[has], quantise)
        beta, both = has.float(), has & inside
        beta[both] = scale_of(rest[both], unit(own[inside[has]])).half().float()
        return Side(coords_width, own_width, torch.zeros(len(x), dtype=torch.int64), coords, own, beta)

    def axes(self, axis: Tensor) -> Side:
        """Sides that are basis vectors, at the places `axis` (m,)."""
        assert self.basis is not None
        features, k = self.basis.shape
        return Side.of_axes(axis, features=features, k=k)


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
    left, seen_left = _products(parts, parts.left, bases[0], factors.X)
    right, seen_right = _products(parts, parts.right, bases[1], factors.Y, whitener=whitener)
    gram = left * right
    aim = (seen_left * factors.s.double()[:, None, :] * seen_right).sum(-1)
    empty = torch.diagonal(gram, dim1=-2, dim2=-1) == 0
    solved = torch.linalg.lstsq(gram + torch.diag_embed(empty.double()), aim[..., None]).solution[..., 0]
    scale = norm.double().clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    sides = (parts.left, parts.right)
    widths = torch.cat([width for side in sides for width in (side.coords_width, side.own_width)])
    exact = bool((widths >= 16).any())  # where numbers are kept as floats gains are to be as exact
    kept = (solved / scale).to(torch.float32 if exact else torch.float16)
    gain = kept.double() * scale
    square = factors.s.double().square().sum(-1) - 2 * (gain * aim).sum(-1)
    square = square + ((gram @ gain[..., None])[..., 0] * gain).sum(-1)
    return replace(parts, gain=kept.float()[parts.user, ordinals(parts.user)]), square.clamp(min=0)


def _products(
    parts: Components, side: Side, basis: Tensor | None, columns: Tensor, *, whitener: Whitener | None = None
) -> tuple[Tensor, Tensor]:
    """L L^T and L X of one side L (b, c, d) and columns X (b, d, r). Coordinates never grow to size d."""
    users = len(columns)
    if basis is None or bool((side.own_width > 0).any()):
        rows = spread(side.vectors(basis), parts.user, users=users)
        rows = rows if whitener is None else whitener.forward(rows)
        return rows @ rows.mT, rows @ columns.double()
    spanned = basis.mT.double() if whitener is None else whitener.forward(basis.mT)
    rows = spread(side.coordinates(len(spanned)), parts.user, users=users)
    seen = (columns.mT.flatten(0, 1).double() @ spanned.mT).unflatten(0, (users, -1)).mT
    return rows @ (spanned @ spanned.mT) @ rows.mT, rows @ seen
