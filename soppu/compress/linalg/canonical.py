"""Canonical form: the thin SVD of many low-rank deltas at once. Nothing of size o x i is formed.

With B = X R_out and A^T = Y R_in, X and Y orthonormal, D = B A = X (R_out R_in^T) Y^T, so the SVD of an r x r
matrix is enough. R is the Cholesky factor of the Gram matrix in float64 (CholeskyQR: Yamamoto, Nakatsukasa,
Yanagisawa, Fukaya, ETNA 44, 2015, section 1); Householder QR takes over where that would lose orthogonality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.linalg.tucker import LARGEST_NORM, SMALLEST_NORM
from soppu.compress.linalg.whitening import Whitener
from soppu.errors import AdapterError

_EPS = torch.finfo(torch.float64).eps
_CHUNK = 1 << 19  # numbers of one side in work at a time: their float64 copy stays in the cache
# Orthogonality of CholeskyQR is lost as eps cond^2: 1e-8 is below what float32 resolves.
_MOST_CONDITION = 1e4
_NEAR_ORTHOGONAL = 2  # times the least condition there is: rows whose angles are far from 0
_LARGE = 1e30  # float32 holds it, its inverse, and some digits of what they are multiplied with


@dataclass(frozen=True, eq=False)
class Canonical:
    """D_n = X_n diag(s_n) Y_n^T for b deltas, q = min(r, o, i) columns."""

    X: Tensor  # (b, o, q) orthonormal where s > 0, zero elsewhere; the largest entry of a column is positive
    s: Tensor  # (b, q) singular values, descending
    Y: Tensor  # (b, i, q) like X, without the rule about signs
    norm: Tensor  # (b,) float64 Frobenius norms; exactly 0 for a delta that is nothing but round-off

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in (self.X, self.s, self.Y, self.norm))

    def of(self, users: Tensor | slice) -> Canonical:
        """Some of the users, in the order given; of a slice a view."""
        return Canonical(self.X.mT[users].mT, self.s[users], self.Y.mT[users].mT, self.norm[users])

    def cpu(self) -> Canonical:
        """The same in the CPU's memory; no copy where it is there."""
        return Canonical(self.X.cpu(), self.s.cpu(), self.Y.cpu(), self.norm.cpu())


def canonical(
    outs: Tensor, ins: Tensor, *, whitener: Whitener | None = None, overwrite: bool = False
) -> Canonical:
    """The thin SVD of D_n = outs[n] @ ins[n], or of what a whitener makes of it.

    O(b (o + i) r^2), O(b r i^2) more whitened. X and Y are transposed views of row-major (b, q, o) and
    (b, q, i): rows make one matrix without a copy. They and s are float64 where a factor is, float32
    otherwise; small matrices are float64 always.

    Args:
        outs: (b, o, r) of any float type, the LoRA scale in them. Narrow adapters have zero columns.
        ins: (b, r, i).
        overwrite: whether X and Y may take the place of factors that are float32 and laid out as they are.

    Raises:
        AdapterError: shapes that do not belong together, or a norm that is not finite in float32.
    """
    if outs.ndim != 3 or ins.ndim != 3 or outs.shape[0] != ins.shape[0] or outs.shape[2] != ins.shape[1]:
        raise AdapterError(
            f"factors of shapes {tuple(outs.shape)} and {tuple(ins.shape)}, allowed: (b, o, r) and (b, r, i)"
        )
    if whitener is not None:
        ins = whitener.to(ins.device).forward(ins).to(ins.dtype)
    dtype = torch.float64 if torch.float64 in (outs.dtype, ins.dtype) else torch.float32
    xt, yt = (_rows(side, dtype, overwrite=overwrite) for side in (outs.mT, ins))
    b, r, o = xt.shape
    q = min(r, o, ins.shape[2])
    if dtype == torch.float32 and q == r:
        s, norm = _in_place(xt, yt)
    else:
        rows = (xt, yt)
        xt, yt = (side.new_empty((b, q, side.shape[2])) for side in rows)
        s, norm = xt.new_empty((b, q), dtype=torch.float64), xt.new_empty(b, dtype=torch.float64)
        for part in torch.arange(b, device=outs.device).split(_step(rows[0])):
            _refine([side[part].double().mT for side in rows], (xt, yt, s, norm), part)
    return Canonical(xt.mT, s.to(dtype), yt.mT, norm)


def _in_place(xt: Tensor, yt: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the rows B^T (b, r, o) and A (b, r, i) float32 into X^T and Y^T; s and norm float64."""
    most = max(side[: _step(side)].numel() for side in (xt, yt))
    room = xt.new_empty((2, most), dtype=torch.float64)  # one for all: a page that is new is a fault
    (left, r_out, cond_out), (right, r_in, cond_in) = (_cholesky(_grams(side, room)) for side in (xt, yt))
    good = (cond_out <= _MOST_CONDITION) & (cond_in <= _MOST_CONDITION)
    w, s, z, norm = _core(r_out * good[:, None, None], r_in * good[:, None, None])
    rest = (~good).nonzero()[:, 0]
    held = [side[rest].double().mT for side in (xt, yt)]
    signs = _apply(left @ w, xt, room=room, condition=cond_out, turn_over=True)
    _apply(right @ z * signs, yt, room=room, condition=cond_in)
    _refine(held, (xt, yt, s, norm), rest)
    return s, norm


def _rows(side: Tensor, dtype: torch.dtype, *, overwrite: bool) -> Tensor:
    """One side as row-major (b, r, d) that may be written to."""
    side = side.detach()
    made = side.to(dtype).contiguous()
    return made if overwrite or made.data_ptr() != side.data_ptr() else made.clone()


def _step(rows: Tensor) -> int:
    return max(_CHUNK // max(rows.shape[1] * rows.shape[2], 1), 1)


def _refine(factors: list[Tensor], made: tuple[Tensor, Tensor, Tensor, Tensor], users: Tensor) -> None:
    """Set X^T, s, Y^T and norm of users whose B (c, o, r) and A^T (c, i, r) may have any condition."""
    xt, yt, s, norm = made
    if len(users):
        (x, r_out), (y, r_in) = (torch.linalg.qr(side) for side in factors)
        w, s[users], z, norm[users] = _core(r_out, r_in)
        x = (x @ w).mT
        signs = _signs(x)
        xt[users], yt[users] = (signs * x).to(xt.dtype), (signs * (y @ z).mT).to(yt.dtype)


def _grams(rows: Tensor, room: Tensor) -> Tensor:
    """(b, r, r) float64 products of rows (b, r, d) with themselves. O(b d r^2)."""
    grams = rows.new_empty((*rows.shape[:2], rows.shape[1]), dtype=torch.float64)
    step = _step(rows)
    for part, gram in zip(rows.split(step), grams.split(step), strict=True):
        taken = _like(part, room[0]).copy_(part)
        torch.bmm(taken, taken.mT, out=gram)
    return grams


def _apply(to: Tensor, rows: Tensor, *, room: Tensor, condition: Tensor, turn_over: bool = False) -> Tensor:
    """Turn rows (b, r, d) into to^T rows in place, from to (b, r, r). O(b d r^2).

    In float64, but where the rows are close to orthogonal and of a usual size: there float32 loses no more
    than rounding does.

    Args:
        room: (2, at least numbers of a step) float64 to work in.
        condition: (b,) Frobenius condition of the rows at equal lengths; r at least.
        turn_over: whether a row is turned over where its entry of largest size is negative.

    Returns:
        (b, 1, r) -1 for rows turned over, 1 otherwise.
    """
    step, r = _step(rows), rows.shape[1]
    signs = to.new_ones((len(to), 1, r))
    reach = to.abs().amax(2)
    unusual = (reach > _LARGE) | ((reach < 1 / _LARGE) & (reach > 0))
    exact = unusual.any(1) | (condition > _NEAR_ORTHOGONAL * r)
    for n in range(0, len(rows), step):
        here = slice(n, n + step)
        part, turn = rows[here], to[here].mT
        if bool(exact[here].any()):
            made = torch.bmm(turn, _like(part, room[0]).copy_(part), out=_like(part, room[1]))
        else:
            made = torch.bmm(turn.to(part), part, out=_like(part, room[1].view(part.dtype)))
        if turn_over:
            signs[here] = _signs(made).mT
            made *= signs[here].mT.to(made)
        part.copy_(made)
    return signs


def _like(part: Tensor, room: Tensor) -> Tensor:
    """As much of the room as `part` needs, in its shape."""
    return room[: part.numel()].view(part.shape)


def _signs(rows: Tensor) -> Tensor:
    """(b, r, 1) the sign of the entry of largest size of each row (b, r, d), 1 for a row of zeros."""
    return torch.where(rows.amax(-1, keepdim=True) >= -rows.amin(-1, keepdim=True), 1.0, -1.0).to(rows)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R^-1 and R with R^T R = gram (b, r, r), and the condition (b,) of R; zero and Inf where there is no R.

    Columns are brought to length 1 first, so that their scales do not count as a condition. A zero column
    gets a zero column of R and a zero row of R^-1.
    """
    length = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    unit.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    lower, info = torch.linalg.cholesky_ex(unit)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    condition = torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(solved)
    found = (info == 0) & condition.isfinite()
    kept = found[:, None, None]
    return (
        torch.where(kept, inverse[:, :, None] * solved.mT, 0.0),
        torch.where(kept, lower.mT * length[:, None, :], 0.0),
        torch.where(found, condition, math.inf),
    )


def _core(r_out: Tensor, r_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, s and Z of the SVD of R_out R_in^T, and its norm (c,); zero where s is round-off of the factors."""
    inner = r_out @ r_in.mT
    size = (torch.linalg.vector_norm(r_out, dim=1) * torch.linalg.vector_norm(r_in, dim=1)).sum(1)
    if not bool((size <= LARGEST_NORM**2).all()):  # the SVD does not take NaN or Inf
        raise AdapterError("factors of a delta: NaN, Inf or too large, allowed: finite numbers")
    w, s, zt = torch.linalg.svd(inner, full_matrices=False)
    noise = (8 * _EPS * size).clamp(min=SMALLEST_NORM)
    norm = s.square().sum(1).sqrt()
    s = torch.where((s > 8 * _EPS * size[:, None]) & (norm > noise)[:, None], s, 0.0)
    norm = s.square().sum(1).sqrt()
    if not bool((norm <= LARGEST_NORM).all()):
        raise AdapterError(f"norm of a delta: {float(norm.max()):.3g}, allowed: up to {LARGEST_NORM:.3g}")
    kept = (s > 0).to(s.dtype)[:, None, :]
    return w * kept, s, zt.mT * kept, norm
