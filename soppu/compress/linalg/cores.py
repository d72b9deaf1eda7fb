"""Cores: a fleet in the coordinates of a few directions, where the joint method costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from soppu.compress.linalg.tucker import CoreFit, Stop, chunks, fit_cores, parts, row_gram


@dataclass(frozen=True, eq=False)
class Cores:
    """n deltas of unit norm, D_n / norm_n ~ basis_out left_n^T right_n basis_in^T."""

    basis_out: Tensor  # (o, K) float64 orthonormal
    basis_in: Tensor  # (i, K')
    left: Tensor  # (n, q, K) coordinates of the columns of X_n, times `weight`
    right: Tensor  # (n, q, K') coordinates of Y_n
    weight: Tensor  # (n, q) float64 singular values of the unit-norm delta, zero for a zero delta
    norm: Tensor  # (n,) float64 Frobenius norms

    @property
    def total(self) -> float:
        """How many deltas are not zero, which is the energy there is."""
        return float((self.norm > 0).sum())

    @property
    def columns(self) -> int:
        """How many columns all deltas have: no side spans more."""
        return int((self.weight > 0).sum())

    def cpu(self) -> Cores:
        """The same in the CPU's memory; no copy where it is there."""
        return Cores(*(getattr(self, field.name).cpu() for field in fields(self)))

    def grown(self, more: Cores) -> Cores:
        """The same users in the directions of both."""
        return replace(
            self,
            basis_out=torch.cat([self.basis_out, more.basis_out], 1),
            basis_in=torch.cat([self.basis_in, more.basis_in], 1),
            left=torch.cat([self.left, more.left], 2),
            right=torch.cat([self.right, more.right], 2),
        )

    def turned(self, out: Tensor, inn: Tensor) -> Cores:
        """The same in directions `out` (K, w) and `inn` (K', w) among these, orthonormal columns."""
        return replace(
            self,
            basis_out=self.basis_out @ out,
            basis_in=self.basis_in @ inn,
            left=self.left @ out.to(self.left.dtype),
            right=self.right @ inn.to(self.right.dtype),
        )

    def ritz(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Ritz values of C on either side, descending, and their vectors. O(n q K^2 + K^3)."""
        grams = self._grams()
        for left, right, weight in self.chunks():
            for gram, part in zip(grams, (left, right * weight[:, :, None]), strict=True):
                columns = part.flatten(0, 1)
                gram += columns.mT @ columns
        out, inn = (torch.linalg.eigh(gram) for gram in grams)
        return (out[0].flip(0), out[1].flip(1)), (inn[0].flip(0), inn[1].flip(1))

    def fit(self, k: int, *, max_steps: int, least: float, start: CoreFit | None = None) -> CoreFit:
        """Alternate in the coordinates, from the truncated HOSVD or from `start`; the energy never falls.

        Args:
            k: at most K, K'.
            least: energy that is not worth a further step.
            start: found in the leading directions, perhaps before the cores were grown; of rank k or more.
        """
        begin = None
        if start is not None:
            sizes = (self.left.shape[2], self.right.shape[2])
            begin = (_padded(start.U[:, :k], sizes[0]), _padded(start.V[:, :k], sizes[1]))
        stop = Stop(max_steps, least, ceiling=self.total)
        return fit_cores(self.left.mT, self.right, rank=k, stop=stop, start=begin)

    def directions(self, found: CoreFit, width: int) -> tuple[Tensor, Tensor]:
        """What either side asks of every user's columns: (n, q, width) each. O(n q K (K + width)).

        It is a step of the alternation, from its `width` leading directions.

        Z_n = F_n F_n^T P_n W for either side: F_n the columns inside the basis of the other side, P_n their
        coordinates and W the leading space of sum_n P_n^T F_n F_n^T P_n.
        """
        found = CoreFit(found.U.to(self.left.dtype), found.V.to(self.right.dtype), found.objective)
        grams = self._grams()
        for left, right in parts(self.left, self.right):
            for gram, factor, part in _half_steps(left, right, found, grams):
                gram += row_gram(part, factor @ factor.mT)
        lead = [torch.linalg.eigh(gram)[1][:, -width:].flip(1).to(self.left.dtype) for gram in grams]
        made: tuple[list[Tensor], list[Tensor]] = ([], [])
        for left, right, weight in parts(self.left, self.right, self.weight.to(self.left.dtype)):
            steps = [
                factor @ (factor.mT @ (part @ space))
                for space, factor, part in _half_steps(left, right, found, lead)
            ]
            made[0].append(weight[:, :, None] * steps[0])
            made[1].append(steps[1])
        return torch.cat(made[0]), torch.cat(made[1])

    def chunks(self) -> Iterator[tuple[Tensor, ...]]:
        """left, right and weight of some users at a time, float64."""
        return chunks(self.left, self.right, self.weight)

    def _grams(self) -> list[Tensor]:
        """Zeros (K, K) and (K', K'), to sum up in."""
        return [self.basis_out.new_zeros((side.shape[2],) * 2) for side in (self.left, self.right)]


def _half_steps(
    left: Tensor, right: Tensor, found: CoreFit, what: list[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For either side: one of `what`, the factor F (n, q, k) without its own weights, and P (n, q, K)."""
    return [(what[0], right @ found.V, left), (what[1], left @ found.U, right)]


def _padded(vectors: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(vectors, (0, 0, 0, size - vectors.shape[0]))
