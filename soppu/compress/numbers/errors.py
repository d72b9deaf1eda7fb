"""Errors of adapters against their own components as stored. Nothing here forms an o x i matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from soppu.compress.numbers.components import Components, grids, ordinals

LOST = 1 - 1e-6  # a relative error from here on says that nothing is left


def squared_errors(
    B: Tensor, A: Tensor, parts: Components, bases: tuple[Tensor | None, Tensor | None], *, norm: Tensor
) -> Tensor:
    """|| D_n - D^_n ||_F^2 of b adapters against their own components as stored, (b,) float64.

    The difference is one low-rank product, [B, -L^T g] [A; R]. O(b (o + i) (r + c)^2).

    Args:
        B: (b, o, r) with A (b, r, i) the deltas.
        parts: components of the users 0 to b - 1.
        bases: output and input basis as stored.
        norm: (b,) what gains are relative to.
    """
    left, right = grids(parts, bases, users=len(norm))
    gains = parts.gain.double() * norm.double()[parts.user]
    scaled = left.clone()
    scaled[parts.user, ordinals(parts.user)] *= gains[:, None]
    out = torch.cat([B.double(), -scaled.mT], 2)
    inn = torch.cat([A.double(), right], 1)
    return squared_norms(out, inn)


def squared_norms(left: Tensor, right: Tensor) -> Tensor:
    """|| left @ right ||_F^2 (...) from left (..., o, c) and right (..., c, i), without the product.

    That of two triangular factors, so what cancels gives the square of round-off. O((o + i) c^2).
    """
    return torch.linalg.matrix_norm(_triangle(left) @ _triangle(right.mT).mT).square()


def _triangle(x: Tensor) -> Tensor:
    return torch.linalg.qr(x, mode="r").R


def relative_errors(squared: Tensor, norm: Tensor) -> Tensor:
    """Relative errors from squared errors and norms of the deltas, (n,); 0 where the delta is zero."""
    return torch.where(norm > 0, squared.sqrt() / torch.where(norm > 0, norm, 1.0), 0.0)
