"""Activation whitening: weigh an error by what the layer's input makes of it. Pure tensor mathematics.

A module's change D (o, i) meets inputs x with second moments C = E[x x^T] (i, i), and its mean squared output
is E ||D x||^2 = tr(D C D^T) = ||D C^{1/2}||_F^2. So whatever minimises a Frobenius norm minimises the output
error once it works on A C^{1/2} in place of A; C^{-1/2} is folded back into what it found, and nobody who
reads the result needs C. One C serves all users of a base model. Source: SVD-LLM (Wang et al., ICLR 2025,
section 3.1); its root is the Cholesky factor, which differs from the symmetric one by a rotation that no norm
sees. With C about the mean of x, as `soppu.calibrate` takes it by default, the norm is of how far the output
varies from token to token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.errors import ConfigError, ModelError

_ROUNDING = 2.0**-22  # rounding C to float32 moves its eigenvalues by at most 2^-24 tr C; four times that


@dataclass(frozen=True, eq=False)
class Whitener:
    """The square root of a module's second moments, of unit scale, and its inverse. Made by `make`."""

    root: Tensor  # (i, i) symmetric, float64
    inverse_root: Tensor  # likewise
    scale: float  # tr C / i, the mean square of an input feature: E ||D x||^2 ~ scale * norm(B, A)^2

    def forward(self, A: Tensor) -> Tensor:
        """A (.., r, i) -> A C^{1/2} (.., r, i), float64. O(r i^2) each."""
        return A.double() @ self.root

    def back(self, A: Tensor) -> Tensor:
        """A (.., r, i) of the whitened space -> A C^{-1/2} (.., r, i), float64. Costs what `forward` does."""
        return A.double() @ self.inverse_root

    def norm(self, B: Tensor, A: Tensor) -> Tensor:
        """||B A C^{1/2}||_F, shape (..), of B (.., o, r) and A (.., r, i): the root mean squared output.

        The norm of D - D^ is `norm` of [B, -B^] and [A; A^]. It goes through triangular factors, so that a
        small difference of two large deltas keeps its digits. O((o + i) r^2) each besides `forward`, and
        nothing of size o x i.
        """
        left = torch.linalg.qr(B.double(), mode="r").R
        right = torch.linalg.qr(self.forward(A).mT, mode="r").R
        return torch.linalg.matrix_norm(left @ right.mT)

    def to(self, device: torch.device) -> Whitener:
        """The same on another device."""
        return Whitener(self.root.to(device), self.inverse_root.to(device), self.scale)


def make(C: Tensor, *, shrink: float = 0.05) -> Whitener:
    """The whitener of second moments C (i, i), any float type.

    C is brought to unit scale and shrunk towards white input, C / (tr C / i) * (1 - shrink) + shrink * I: few
    tokens leave C without full rank, and no direction of the input may count for nothing. White input gives
    the identity, and so does shrink = 1. O(i^3) once.

    The diagonal of C alone would cost O(i), but it is no substitute: an input is strong in directions that no
    axis points to, and scaling its features one by one can leave more output error than no whitening at all.

    Args:
        shrink: share of white input, above 0 and at most 1.

    Raises:
        ConfigError: shrink out of range.
        ModelError: C is not square, not finite, zero, not symmetric, or not positive semidefinite beyond
            rounding.
    """
    if not (math.isfinite(shrink) and 0 < shrink <= 1):
        raise ConfigError(f"shrink = {shrink!r}, allowed: a number above 0 and at most 1")
    if reason := fault(C):
        raise ModelError(f"second moments: {reason}")
    C = C.double()
    scale = float(C.trace()) / C.shape[0]
    values, vectors = torch.linalg.eigh((C + C.T) / 2)
    root = (values.clamp_min(0) / scale * (1 - shrink) + shrink).sqrt()
    return Whitener(vectors * root @ vectors.T, vectors / root @ vectors.T, scale)


def fault(C: Tensor) -> str:
    """Why C (i, i) cannot be the second moments of an input that is not all zero; "" where it can. O(i^3)."""
    if C.ndim != 2 or C.shape[0] != C.shape[1] or not C.shape[0]:
        return f"shape {tuple(C.shape)}, expected (i, i)"
    C = C.double()
    trace = float(C.trace())
    if not bool(torch.isfinite(C).all()) or not math.isfinite(trace):
        return "NaN or Inf"
    if trace <= 0:
        return f"trace {trace:.3g}, expected a positive one: the input of a layer is not all zero"
    if (apart := float((C - C.T).abs().max())) > _ROUNDING * trace:
        return (
            f"not symmetric: entries differ by {apart:.3g} from their mirror image, the trace is {trace:.3g}"
        )
    shifted = (C + C.T) / 2 / trace
    shifted.diagonal().add_(_ROUNDING)
    if int(torch.linalg.cholesky_ex(shifted).info):
        least = -_ROUNDING * trace
        return f"not positive semidefinite: an eigenvalue below {least:.3g}, the trace is {trace:.3g}"
    return ""


def participation(C: Tensor) -> float:
    """(tr C)^2 / ||C||_F^2: how many directions the input uses, from 1 to i (white). O(i^2)."""
    C = C.double()
    return float(C.trace().square() / C.square().sum())
