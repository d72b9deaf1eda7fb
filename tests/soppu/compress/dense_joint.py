"""The joint method by eigenproblems of all features or all columns: what fits are held against.

Exact where `tolerance` is 0, and far slower than `soppu.compress.methods.shared_basis`, which ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.linalg.tucker import LARGEST_NORM, SMALLEST_NORM
from soppu.errors import AdapterError

_EPS = torch.finfo(torch.float64).eps
_SPARE = 8  # columns carried beyond k, so that convergence does not hang on the gap right after k
_SWEEPS = 8  # block iterations before the full eigenproblem is solved after all
_INNER = 0.01  # a sweep that gains less than this share of the stopping gain ends the half step


@dataclass(frozen=True, eq=False)
class JointFit:
    """What `fit` found for one module, in float64: D_n ~ norm_n * U @ left_n @ right_n @ V^T.

    Attributes:
        U: (o, k) orthonormal columns, ordered by energy; the largest entry of each is positive.
        V: (i, k) likewise.
        left: (n, k, q) with `right` (n, q, k) the unit-norm cores as products; q = min(max r, o).
        right: see `left`.
        norm: (n,) Frobenius norm of every delta, 0 where it is zero.
        objective: energy captured after the start and after every step; at most `total`, never falls.
        total: how many deltas are not zero, which is the energy there is to capture.
        lower_bound: no basis of rank k leaves a smaller squared error.
        upper_bound: the start leaves no larger one. Both are sums over unit-norm adapters.
    """

    U: Tensor
    V: Tensor
    left: Tensor
    right: Tensor
    norm: Tensor
    objective: tuple[float, ...]
    total: float
    lower_bound: float
    upper_bound: float

    @property
    def steps(self) -> int:
        """Alternations made after the start."""
        return len(self.objective) - 1

    @property
    def achieved(self) -> float:
        """Squared error left, summed over unit-norm adapters; never negative."""
        return max(self.total - self.objective[-1], 0.0)


@dataclass(frozen=True, eq=False)
class _Side:
    """One side of all deltas: X_n = basis @ parts_n, basis (d, p) or None where p = d, parts (n, p, q)."""

    basis: Tensor | None
    parts: Tensor

    def lift(self, vectors: Tensor) -> Tensor:
        """Small coordinates (p, k) -> feature space (d, k)."""
        return vectors if self.basis is None else self.basis @ vectors


def fit(
    outs: Sequence[Tensor],
    ins: Sequence[Tensor],
    *,
    rank: int,
    max_steps: int = 10,
    tolerance: float = 1e-5,
) -> JointFit:
    """Fit one shared basis to n low-rank deltas D_n = outs[n] @ ins[n].

    With m = the sum of the ranks and, on a side of d features, p = m where m is well below d, else p = d,
    each side costs O(d m p) once and O(p^2 m + p^3) a step, and O(d m) memory.

    Args:
        outs: n tensors (o, r_n) of any float type, the LoRA scale in them. r_n may differ; 0 = no adapter.
        ins: n tensors (r_n, i).
        rank: k asked for; min(k, o, i, m) is used.
        max_steps: most alternations after the start.
        tolerance: stop once two steps in a row gain less than this share of `total`, or once the lower bound
            shows that no more can be gained. 0 asks for exact eigen-decompositions throughout; otherwise the
            sweeps inside a large step end when one gains less than a hundredth of this share.

    Raises:
        AdapterError: a delta whose norm does not fit into float32.
    """
    ranks = [int(b.shape[1]) for b in outs]
    x, m, y, norm = _canonical(outs, ins)
    out, inn = _reduce(x, ranks), _reduce(y, ranks)
    k = min(rank, outs[0].shape[0], ins[0].shape[1], sum(ranks))
    values_out, u = leading(gram_root(out.parts, m), k)
    values_in, v = leading(gram_root(inn.parts, m.mT), k)
    total = float((norm > 0).sum())
    tails = [float(values.clamp(min=0)[k:].sum()) for values in (values_out, values_in)]
    # Round-off of two p x p eigenproblems: the bounds are widened by it, to hold for the computed numbers.
    slack = 8 * _EPS * (len(values_out) + len(values_in)) * total
    lower, upper = max(max(tails) - slack, 0.0), sum(tails) + slack

    small = Alternation(out.parts, m, inn.parts, least=tolerance * total)
    u, v, objective = small.run(u, v, max_steps=max_steps, ceiling=total - lower)
    u, v = fix_signs(out.lift(u)), fix_signs(inn.lift(v))
    return JointFit(u, v, u.mT @ x, m @ (y.mT @ v), norm, objective, total, lower, upper)


@dataclass(frozen=True, eq=False)
class Alternation:
    """HOOI on D_n = x_n m_n y_n^T in small coordinates; `least` is the energy not worth a further step."""

    x: Tensor
    m: Tensor
    y: Tensor
    least: float

    def run(
        self, u: Tensor, v: Tensor, *, max_steps: int, ceiling: float
    ) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Alternate from (u, v) until nothing worth having is gained; V's half step uses the new U."""
        objective = [self.energy(u, v)]
        quiet = 0
        while len(objective) <= max_steps and quiet < 2 and ceiling - objective[-1] > self.least:
            u = _follow(gram_root(self.x, self.m @ (self.y.mT @ v)), u, least=_INNER * self.least)
            v = _follow(gram_root(self.y, self.m.mT @ (self.x.mT @ u)), v, least=_INNER * self.least)
            objective.append(self.energy(u, v))
            quiet = quiet + 1 if objective[-1] - objective[-2] < self.least else 0
        return u, v, tuple(objective)

    def energy(self, u: Tensor, v: Tensor) -> float:
        """sum_n || u^T D_n v ||_F^2, the energy this basis captures."""
        return float(((u.mT @ self.x) @ self.m @ (self.y.mT @ v)).square().sum())


def _canonical(outs: Sequence[Tensor], ins: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D_n = norm_n X_n M_n Y_n^T, X, Y orthonormal, ||M_n|| = 1: free of the gauge (B G, G^-1 A). O(n d r^2).

    Narrow adapters are padded with zero columns, which come out of QR as zero rows and columns of M.
    """
    x, r_out = torch.linalg.qr(pad(outs))
    y, r_in = torch.linalg.qr(pad([a.mT for a in ins]))
    m = r_out @ r_in.mT
    norm = torch.linalg.matrix_norm(m)
    if not bool((norm <= LARGEST_NORM).all()):
        raise AdapterError(f"norm of a delta: {float(norm.max()):.3g}, allowed: up to {LARGEST_NORM:.3g}")
    # A delta that is nothing but the round-off of its factors is a zero delta too.
    noise = 8 * _EPS * torch.linalg.matrix_norm(r_out) * torch.linalg.matrix_norm(r_in)
    norm = torch.where(norm <= noise.clamp(min=SMALLEST_NORM), 0.0, norm)
    m = torch.where(norm[:, None, None] > 0, m / norm.clamp(min=SMALLEST_NORM)[:, None, None], 0.0)
    return x, m, y, norm


def pad(columns: Sequence[Tensor]) -> Tensor:
    """Stack n ragged tensors (d, r_n) into one (n, d, max r) in float64, zeros on the right."""
    width = max(c.shape[1] for c in columns)
    padded = columns[0].new_zeros((len(columns), columns[0].shape[0], width), dtype=torch.float64)
    for index, column in enumerate(columns):
        padded[index, :, : column.shape[1]] = column.detach()
    return padded


def _reduce(x: Tensor, ranks: Sequence[int]) -> _Side:
    """Move one side (n, d, q) into the span of its m = sum r_n true columns, side by side. O(d m^2).

    Past three quarters of d that QR costs more than the smaller eigenproblems save.
    """
    n, d, q = x.shape
    slots = [user * q + j for user, r in enumerate(ranks) for j in range(min(r, q))]
    if 4 * len(slots) > 3 * d:
        return _Side(None, x)
    basis, small = torch.linalg.qr(x.transpose(0, 1).reshape(d, n * q)[:, slots])
    parts = x.new_zeros((len(slots), n * q))
    parts[:, slots] = small
    return _Side(basis, parts.reshape(-1, n, q).transpose(0, 1).contiguous())


def gram_root(parts: Tensor, factor: Tensor) -> Tensor:
    """W (p, n f) with W W^T = sum_n (X_n F_n) (X_n F_n)^T, from parts (n, p, q) and factors F (n, q, f)."""
    if factor.shape[2] > factor.shape[1]:
        # Only F F^T counts, so its triangular root (q, q) does the work of F (q, f).
        factor = torch.linalg.qr(factor.mT, mode="r").R.mT
    return (parts @ factor).transpose(0, 1).reshape(parts.shape[1], -1)


def leading(root: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of W W^T, descending, and its leading k eigenvectors (p, k). O(p^2 n f + p^3)."""
    values, vectors = torch.linalg.eigh(root @ root.mT)
    return values.flip(0), vectors[:, -k:].flip(1)


def _follow(root: Tensor, start: Tensor, *, least: float) -> Tensor:
    """The leading space of W W^T, from the orthonormal `start` (p, k) of the step before.

    Small problems are solved outright. Large ones take block Rayleigh-Ritz sweeps over [block, W W^T block],
    which lose no energy: the block is in the space searched. A sweep that gains `least` or less ends them.
    """
    p, k = start.shape
    width = k + _SPARE
    if least > 0 and p >= 5 * width:
        block: Tensor = start
        image = root.mT @ block
        captured = image.square().sum()
        for _ in range(_SWEEPS):
            space, _ = torch.linalg.qr(torch.cat([block, root @ image], dim=1))
            seen = space.mT @ root
            _, vectors = leading(seen, width)
            block, image = space @ vectors, seen.mT @ vectors
            before, captured = captured, image[:, :k].square().sum()
            if float(captured - before) <= least:
                return block[:, :k]
    return leading(root, k)[1]


def fix_signs(columns: Tensor) -> Tensor:
    """Flip columns (..., d, k) so that the entry of largest size in each is positive."""
    return columns * _signs(columns)


def _signs(columns: Tensor) -> Tensor:
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)
