"""Cores: a fleet in the coordinates of a few directions, where the joint method costs next to nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.compress.joint import Alternation, gram_root, leading


@dataclass(frozen=True, eq=False)
class Directions:
    """What either side asks of every user's columns: out (n, q, p), inn (n, q, p')."""

    out: Tensor
    inn: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """A basis in coordinates, u (K, k) and v (K', k); the energy at the start and after every step."""

    u: Tensor
    v: Tensor
    objective: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Cores:
    """n deltas of unit norm, D_n / norm_n ~ basis_out out_n^T diag(weight_n) inn_n basis_in^T.

    Attributes:
        basis_out: (o, K) float64 orthonormal.
        basis_in: (i, K').
        out: (n, q, K) coordinates of the columns of X_n.
        weight: (n, q) float64 singular values of the unit-norm delta, zero for a zero delta.
        inn: (n, q, K') coordinates of Y_n.
        norm: (n,) float64 Frobenius norms.
    """

    basis_out: Tensor
    basis_in: Tensor
    out: Tensor
    weight: Tensor
    inn: Tensor
    norm: Tensor

    @property
    def total(self) -> float:
        """How many deltas are not zero, which is the energy there is."""
        return float((self.norm > 0).sum())

    @property
    def columns(self) -> int:
        """How many columns all deltas have: no side spans more."""
        return int((self.weight > 0).sum())

    def grown(self, more: Cores) -> Cores:
        """The same users in the directions of both."""
        return replace(
            self,
            basis_out=torch.cat([self.basis_out, more.basis_out], 1),
            basis_in=torch.cat([self.basis_in, more.basis_in], 1),
            out=torch.cat([self.out, more.out], 2),
            inn=torch.cat([self.inn, more.inn], 2),
        )

    def outside(self) -> Tensor:
        """(n,) energy of every unit-norm delta outside the directions; no basis within them reaches it.

        O(n q^2 (K + K')). Round-off of the coordinates bounds it from below, about 1e-7 for float32.
        """
        left, right = self._doubled()
        gram_out, gram_in = left @ left.mT, right @ right.mT
        inside = (self.weight[:, :, None] * self.weight[:, None, :] * gram_out * gram_in).sum((1, 2))
        return ((self.norm > 0).double() - inside).clamp(min=0)

    def ritz(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Ritz values of C on either side, descending, and their vectors. O(n q K^2 + K^3)."""
        left, right = self._doubled()
        made = []
        for part in (left, right):
            root = (part * self.weight[:, :, None]).flatten(0, 1).mT
            made.append(leading(root, root.shape[0]))
        return made[0], made[1]

    def fit(self, k: int, *, max_steps: int, least: float, start: Found | None = None) -> Found:
        """Alternate in the coordinates, from the truncated HOSVD or from `start`; the energy never falls.

        Args:
            k: at most K, K'.
            least: energy that is not worth a further step.
            start: found in the leading directions, before the cores were grown.
        """
        if start is None:
            (_, u), (_, v) = self.ritz()
            u, v = u[:, :k], v[:, :k]
        else:
            u, v = _padded(start.u, self.out.shape[2]), _padded(start.v, self.inn.shape[2])
        left, right = self._doubled()
        steps = Alternation(left.mT, torch.diag_embed(self.weight), right.mT, least=least)
        return Found(*steps.run(u, v, max_steps=max_steps, ceiling=self.total))

    def directions(self, found: Found, width: int) -> Directions:
        """A step of the alternation, from its `width` leading directions. O(n q K (q + width))."""
        left, right = self._doubled()
        to_out = self.weight[:, :, None] * (right @ found.v)
        to_in = self.weight[:, :, None] * (left @ found.u)
        return Directions(_step(left, to_out, width), _step(right, to_in, width))

    def _doubled(self) -> tuple[Tensor, Tensor]:
        return self.out.double(), self.inn.double()


def _step(parts: Tensor, factor: Tensor, width: int) -> Tensor:
    """F_n F_n^T P_n W, W the leading space of sum_n P_n^T F_n F_n^T P_n; P (n, q, K) and F (n, q, k)."""
    _, lead = leading(gram_root(parts.mT, factor), min(width, parts.shape[2]))
    return factor @ (factor.mT @ (parts @ lead))


def _padded(vectors: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(vectors, (0, 0, 0, size - vectors.shape[0]))
