"""One shared basis for many adapters: the joint method.

Every adapter of a module is scaled to unit Frobenius norm, so a strong user does not erase a weak one, and

    min over orthonormal U (o, k), V (i, k) and cores S_n (k, k) of  sum_n || D_n / ||D_n|| - U S_n V^T ||_F^2

is solved by alternation. It is the Tucker-2 decomposition of the (n, o, i) tensor: the start is the truncated
HOSVD, a step is HOOI's (De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000; for LoRA
adapters: Brüel Gabrielsson et al., "Compress then Serve", ICML 2025, appendix A.1). Deltas here are cores,
few numbers each, in the directions that `range_finder` finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_NORM = float(torch.finfo(torch.float32).tiny)  # norms are stored in float32: a smaller delta is zero
LARGEST_NORM = float(torch.finfo(torch.float32).max)
_USERS = 256  # users of core space taken at a time


@dataclass(frozen=True, eq=False)
class CoreFit:
    """A joint fit of deltas that are few numbers: U (p, k), V (q, k), and the energy captured on the way."""

    U: Tensor
    V: Tensor
    objective: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Alternations made after the start."""
        return len(self.objective) - 1


@dataclass(frozen=True)
class Stop:
    """When an alternation ends."""

    max_steps: int
    least: float  # energy that is not worth a step: two in a row that gain less end it
    ceiling: float  # energy there is to capture; within `least` of it nothing is left to gain


def fit_cores(
    left: Tensor, right: Tensor, *, rank: int, stop: Stop, start: tuple[Tensor, Tensor] | None = None
) -> CoreFit:
    """Fit one basis to n deltas left_n right_n as they are, their norms the weights. O(n p r (p + r)) a step.

    Args:
        left: (n, p, r) with right (n, r, q).
        rank: k; min(k, p, q) is used.
        start: U (p, k) and V (q, k) to begin with; by default the truncated HOSVD.
    """
    k, size = min(rank, left.shape[1], right.shape[2]), max(left.shape[1], right.shape[2])
    if not len(left):
        eye = torch.eye(size, dtype=torch.float64, device=left.device)
        return CoreFit(eye[: left.shape[1], :k], eye[: right.shape[2], :k], (0.0,))
    u, v = start or (_top(left, right, None, k), _top(right.mT, left.mT, None, k))
    objective, quiet = [_inside(left, right, u, v)], 0
    while len(objective) <= stop.max_steps and quiet < 2 and stop.ceiling - objective[-1] > stop.least:
        u = _top(left, right, v, k)
        v = _top(right.mT, left.mT, u, k)
        objective.append(_inside(left, right, u, v))
        quiet = quiet + 1 if objective[-1] - objective[-2] < stop.least else 0
    return CoreFit(u, v, tuple(objective))


def core_energy(left: Tensor, right: Tensor) -> float:
    """sum_n || left_n right_n ||_F^2. O(n (p + q) r^2)."""
    energies = (((x.mT @ x) * (y @ y.mT)).sum() for x, y in chunks(left, right))
    return float(sum(energies))


def _inside(left: Tensor, right: Tensor, u: Tensor, v: Tensor) -> float:
    """The energy inside both bases."""
    return float(sum(((x.mT @ u).mT @ (y @ v)).square().sum() for x, y in chunks(left, right)))


def _top(left: Tensor, right: Tensor, inner: Tensor | None, k: int) -> Tensor:
    """Leading k eigenvectors of sum_n D_n P D_n^T, P = inner inner^T or the identity. O(n p^2 r + p^3).

    Products are of the type of the deltas, sums over users float64: what an error of the vectors costs is its
    square.
    """
    gram = torch.zeros((left.shape[1], left.shape[1]), dtype=torch.float64, device=left.device)
    for x, y in parts(left, right):
        seen = y if inner is None else y @ inner.to(y.dtype)
        gram += row_gram(x.mT, seen @ seen.mT)
    return torch.linalg.eigh(gram)[1][:, -k:].flip(1)


def row_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """sum_n R_n^T W_n R_n (p, p), from rows (n, r, p) and W (n, r, r). O(n r p (p + r)).

    Where the rows of all users lie below each other nothing is copied, and the sum is one product.
    """
    return rows.flatten(0, 1).mT @ (weight @ rows).flatten(0, 1)


def parts(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some users of each (n, ...) at a time, so that sums over them take little memory."""
    return zip(*(side.split(_USERS) for side in sides), strict=True)


def chunks(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same in float64."""
    for part in parts(*sides):
        yield tuple(side.double() for side in part)
