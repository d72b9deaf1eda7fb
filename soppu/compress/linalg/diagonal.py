"""JD-Diag: one basis for each side and a diagonal core of k numbers for each user.

    min over U (K, k), V (K, k), sigma (n, k) of  sum_n || D_n - U diag(sigma_n) V^T ||_F^2

U and V need not be orthogonal. It is the CP (PARAFAC) decomposition of the (n, K, K) tensor, by alternating
least squares (Kolda & Bader, SIAM Review 51(3), 2009, section 3.4; for LoRA adapters: Brüel Gabrielsson et
al., "Compress then Serve", ICML 2025, appendix A). A ridge and unit columns keep it from
slowing down where columns become nearly parallel and grow without bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.linalg.tucker import core_energy

_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class DiagonalFit:
    """U (K, k) and V (K, k) with unit columns, sigma (n, k), and the squared error after every step."""

    U: Tensor
    V: Tensor
    sigma: Tensor
    errors: tuple[float, ...]


def fit(
    left: Tensor, right: Tensor, start: tuple[Tensor, Tensor], *, max_steps: int, tolerance: float
) -> DiagonalFit:
    """Alternating least squares from `start` = (U, V), the joint fit's. O(n K r k + n k^2) a step; float64.

    Args:
        left: (n, K, r) with right (n, r, K): D_n = left_n right_n.
        max_steps: most steps; the error never rises, and two steps that gain less than `tolerance` of the
            energy end it.
    """
    left, right = left.double(), right.double()
    u, v = (_unit(side.double()) for side in start)
    total = core_energy(left, right)
    sigma = _diagonals(left, right, u, v)
    errors, quiet = [_error(total, left, right, (u, v, sigma))], 0
    while len(errors) <= max_steps and quiet < 2:
        u = _unit(_side(left, right @ v, sigma, v))
        sigma = _diagonals(left, right, u, v)
        v = _unit(_side(right.mT, left.mT @ u, sigma, u))
        sigma = _diagonals(left, right, u, v)
        errors.append(_error(total, left, right, (u, v, sigma)))
        quiet = quiet + 1 if errors[-2] - errors[-1] < tolerance * total else 0
    return DiagonalFit(u, v, sigma, tuple(errors))


def _side(x: Tensor, seen: Tensor, sigma: Tensor, other: Tensor) -> Tensor:
    """U = (sum_n D_n V diag(sigma_n)) (sum_n sigma_n sigma_n^T * V^T V)^-1, from D_n V = x_n seen_n."""
    pulled = torch.einsum("npr,nrk,nk->pk", x, seen, sigma)
    return _solve((sigma.mT @ sigma) * (other.mT @ other), pulled.mT).mT


def _diagonals(left: Tensor, right: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """sigma_n = (U^T U * V^T V)^-1 diag(U^T D_n V)."""
    pulled = ((u.mT @ left) * (right @ v).mT).sum(-1)
    return _solve((u.mT @ u) * (v.mT @ v), pulled.mT).mT


def _solve(gram: Tensor, aim: Tensor) -> Tensor:
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), aim)


def _error(total: float, left: Tensor, right: Tensor, fit: tuple[Tensor, Tensor, Tensor]) -> float:
    u, v, sigma = fit
    pulled = ((u.mT @ left) * (right @ v).mT).sum(-1)
    model = ((sigma.mT @ sigma) * (u.mT @ u) * (v.mT @ v)).sum()
    return max(total - 2 * float((pulled * sigma).sum()) + float(model), 0.0)


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
