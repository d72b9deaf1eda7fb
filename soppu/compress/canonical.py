"""Canonical form: the thin SVD of many low-rank deltas at once. Nothing of size o x i is formed.

With B = X R_out and A^T = Y R_in, X and Y orthonormal, D = B A = X (R_out R_in^T) Y^T, so the SVD of an r x r
matrix is enough. R is the Cholesky factor of the Gram matrix in float64 (CholeskyQR: Yamamoto, Nakatsukasa,
Yanagisawa, Fukaya, ETNA 44, 2015, section 1); Householder QR takes over where that would lose orthogonality.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.joint import LARGEST_NORM, SMALLEST_NORM
from soppu.errors import AdapterError

_EPS = torch.finfo(torch.float64).eps
_CHUNK = 1 << 19  # numbers of one side in work at a time: their float64 copy stays in the cache
# Orthogonality of CholeskyQR is lost as eps cond^2: 1e-8 is below what float32 resolves.
_MOST_CONDITION = 1e4


@dataclass(frozen=True, eq=False)
class Canonical:
    """D_n = X_n diag(s_n) Y_n^T for b deltas, q = min(r, o, i) columns.

    Attributes:
        X: (b, o, q) orthonormal columns where s > 0, zero elsewhere; the largest entry of each is positive.
        s: (b, q) singular values, descending.
        Y: (b, i, q) like X, without the rule about signs.
        norm: (b,) float64 Frobenius norms; exactly 0 for a delta that is nothing but round-off.
    """

    X: Tensor
    s: Tensor
    Y: Tensor
    norm: Tensor

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


def canonical(outs: Tensor, ins: Tensor, *, overwrite: bool = False) -> Canonical:
    """The thin SVD of D_n = outs[n] @ ins[n]. O(b (o + i) r^2).

    X and Y are transposed views of row-major (b, q, o) and (b, q, i): rows make one matrix without a copy.
    They and s are float64 where a factor is, float32 otherwise; small matrices are float64 always.

    Args:
        outs: (b, o, r) of any float type, the LoRA scale in them. Narrow adapters have zero columns.
        ins: (b, r, i).
        overwrite: whether X and Y may take the place of factors that are float32 and laid out as they are.

    Raises:
        AdapterError: shapes that do not belong together, or a norm that is not finite in float32.
    """
    _check(outs, ins)
    dtype = torch.float64 if torch.float64 in (outs.dtype, ins.dtype) else torch.float32
    rows = [_rows(side, dtype, overwrite=overwrite) for side in (outs.mT, ins)]
    b, r, o = rows[0].shape
    q = min(r, o, ins.shape[2])
    rest = torch.arange(b, device=outs.device)
    if dtype == torch.float32 and q == r:
        xt, yt = rows
        (left, r_out, good_out), (right, r_in, good_in) = (_cholesky(_grams(side)) for side in rows)
        good = good_out & good_in
        w, s, z, norm = _core(r_out * good[:, None, None], r_in * good[:, None, None])
        rest = rest[~good]
        held = [side[rest].double().mT for side in rows]
        _apply(left @ w, xt)
        _apply(right @ z, yt)
        _refine(held, (xt, yt, s, norm), rest)
    else:
        xt, yt = (side.new_empty((b, q, side.shape[2])) for side in rows)
        s, norm = xt.new_empty((b, q), dtype=torch.float64), xt.new_empty(b, dtype=torch.float64)
        for part in rest.split(_step(rows[0])):
            _refine([side[part].double().mT for side in rows], (xt, yt, s, norm), part)
    _fix_signs(xt, yt)
    return Canonical(xt.mT, s.to(dtype), yt.mT, norm)


def _rows(side: Tensor, dtype: torch.dtype, *, overwrite: bool) -> Tensor:
    """One side as row-major (b, r, d) that may be written to."""
    side = side.detach()
    made = side.to(dtype).contiguous()
    return made if overwrite or made.data_ptr() != side.data_ptr() else made.clone()


def _check(outs: Tensor, ins: Tensor) -> None:
    if outs.ndim != 3 or ins.ndim != 3 or outs.shape[0] != ins.shape[0] or outs.shape[2] != ins.shape[1]:
        raise AdapterError(
            f"factors of shapes {tuple(outs.shape)} and {tuple(ins.shape)}, allowed: (b, o, r) and (b, r, i)"
        )


def _step(rows: Tensor) -> int:
    return max(_CHUNK // max(rows.shape[1] * rows.shape[2], 1), 1)


def _refine(factors: list[Tensor], made: tuple[Tensor, Tensor, Tensor, Tensor], users: Tensor) -> None:
    """Set X^T, s, Y^T and norm of users whose B (c, o, r) and A^T (c, i, r) may have any condition."""
    xt, yt, s, norm = made
    if len(users):
        (x, r_out), (y, r_in) = (torch.linalg.qr(side) for side in factors)
        w, s[users], z, norm[users] = _core(r_out, r_in)
        xt[users], yt[users] = (x @ w).mT.to(xt.dtype), (y @ z).mT.to(yt.dtype)


def _grams(rows: Tensor) -> Tensor:
    """(b, r, r) float64 products of rows (b, r, d) with themselves. O(b d r^2)."""
    grams = rows.new_empty((*rows.shape[:2], rows.shape[1]), dtype=torch.float64)
    wide = torch.empty_like(rows[: _step(rows)], dtype=torch.float64)
    for part, gram in zip(rows.split(len(wide)), grams.split(len(wide)), strict=True):
        taken = wide[: len(part)].copy_(part)
        torch.bmm(taken, taken.mT, out=gram)
    return grams


def _apply(to: Tensor, rows: Tensor) -> None:
    """Turn rows (b, r, d) into to^T rows in place, in float64, from to (b, r, r). O(b d r^2)."""
    wide = torch.empty_like(rows[: _step(rows)], dtype=torch.float64)
    made, step = torch.empty_like(wide), len(wide)
    for turn, part in zip(to.split(step), rows.split(step), strict=True):
        taken = wide[: len(part)].copy_(part)
        part.copy_(torch.bmm(turn.mT, taken, out=made[: len(part)]))


def _fix_signs(xt: Tensor, yt: Tensor) -> None:
    """Turn rows of (b, q, d) over, in place, where the entry of largest size in X's is negative."""
    step = _step(xt)
    for left, right in zip(xt.split(step), yt.split(step), strict=True):
        signs = torch.where(left.amax(-1, keepdim=True) >= -left.amin(-1, keepdim=True), 1.0, -1.0).to(left)
        left.mul_(signs)
        right.mul_(signs)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R^-1 and R with R^T R = gram (b, r, r), and where (b,) they can be trusted; zero where not.

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
    good = (info == 0) & (condition <= _MOST_CONDITION)  # a condition that is NaN is not good
    kept = good[:, None, None]
    return (
        torch.where(kept, inverse[:, :, None] * solved.mT, 0.0),
        torch.where(kept, lower.mT * length[:, None, :], 0.0),
        good,
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
