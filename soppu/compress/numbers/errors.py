"""Errors of adapters against their own components as stored. Nothing here forms an o x i matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from soppu.compress.numbers.components import Components, ordinals, spread

LOST = 1 - 1e-6  # a relative error from here on says that nothing is left


def squared_errors(
    B: Tensor, A: Tensor, parts: Components, bases: tuple[Tensor | None, Tensor | None], *, norm: Tensor
) -> Tensor:
    """|| D_n - D^_n ||_F^2 of b adapters against their own components as stored, (b,) float64.

    The difference is one low-rank product, [B, -L^T g] [A; R]. O(b (o + i) (r + c)^2).

    Args:
        B: (b, o, r) with A (b, r, i) the deltas; their components are those of the users 0 to b - 1.
        bases: output and input basis as stored.
        norm: (b,) what gains are relative to.
    """
    sides = zip((parts.left, parts.right), bases, strict=True)
    left, right = (spread(side.vectors(basis), parts.user, users=len(norm)) for side, basis in sides)
    gains = parts.gain.double() * norm.double()[parts.user]
    left[parts.user, ordinals(parts.user)] *= gains[:, None]
    return squared_norms(torch.cat([B.double(), -left.mT], 2), torch.cat([A.double(), right], 1))


def squared_norms(left: Tensor, right: Tensor) -> Tensor:
    """|| left @ right ||_F^2 (...) from left (..., o, c) and right (..., c, i), without the product.

    That of two triangular factors, so what cancels gives the square of round-off. O((o + i) c^2).
    """
    out, inn = (torch.linalg.qr(side, mode="r").R for side in (left, right.mT))
    return torch.linalg.matrix_norm(out @ inn.mT).square()


def relative_errors(squared: Tensor, norm: Tensor) -> Tensor:
    """Relative errors from squared errors and norms of the deltas, (n,); 0 where the delta is zero."""
    return torch.where(norm > 0, squared.sqrt() / torch.where(norm > 0, norm, 1.0), 0.0)
