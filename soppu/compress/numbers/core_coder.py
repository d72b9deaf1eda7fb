"""The coding of shared-basis cores: D_n ~ U S_n V^T with S_n in coordinates alone. Not for finding U and V.

Three forms, the smallest that says the same: thin, S_n = sum_j sigma_j p_j q_j^T with at most r_n terms,
since the rank of S_n is at most r_n; full, one component for each row of S_n; and diagonal, where only
gains are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.numbers.coders import SideCoder, with_gains
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.quantise import AXIS, quantise_coords


@dataclass(frozen=True, eq=False)
class CoreCoder:
    """Codes the deltas of one module inside one pair of bases.

    Attributes:
        left: output basis.
        right: input basis.
        width: of the coordinates.
        diagonal: whether cores are diagonal, as JD-Diag makes them.
        whitener: weighs errors on the input side.
    """

    left: SideCoder
    right: SideCoder
    width: int
    diagonal: bool
    whitener: Whitener | None

    def code(self, factors: Canonical, norm: Tensor, price: Tensor) -> tuple[Components, Tensor]:
        """The components of b users and their squared errors in the metric of the fit, (b,). `price` is not
        used.
        """
        present = factors.s[:, 0] > 0
        parts = self._diagonal(present) if self.diagonal else self._core(factors, present)
        bases = (self.left.basis, self.right.basis)
        return with_gains(factors, parts, bases, norm=norm, whitener=self.whitener)

    def _core(self, factors: Canonical, present: Tensor) -> Components:
        assert self.left.solve is not None and self.right.solve is not None
        x = factors.X.mT @ self.left.solve.mT
        stored = factors.Y.mT if self.whitener is None else self.whitener.back(factors.Y.mT).to(x.dtype)
        y = stored @ self.right.solve.mT
        k_out, k_in, rank = x.shape[2], y.shape[2], int((factors.s > 0).sum(1).max())
        cores = (x * factors.s[:, :, None]).mT @ y
        if k_out * k_in <= (k_out + k_in) * min(rank, k_out, k_in):
            return self._full(cores, present)
        p, sigma, qt = torch.linalg.svd(cores.double(), full_matrices=False)
        keep = (torch.arange(sigma.shape[1]) < (factors.s > 0).sum(1)[:, None]) & (sigma > 0)
        user = torch.arange(len(cores))[:, None].expand_as(keep)[keep]
        left, right = self._coords(p.mT[keep].float(), self.left), self._coords(qt[keep].float(), self.right)
        return Components(user, torch.zeros(len(user)), left, right)

    def _full(self, cores: Tensor, present: Tensor) -> Components:
        users, k_out, _ = cores.shape
        keep = present.repeat_interleave(k_out)
        user = torch.arange(users).repeat_interleave(k_out)
        rows = self._coords(cores.reshape(users * k_out, -1)[keep], self.right)
        axes = _axes(torch.arange(k_out).repeat(users)[keep], self.left)
        return Components(user[keep], torch.zeros(int(keep.sum())), axes, rows)

    def _diagonal(self, present: Tensor) -> Components:
        assert self.left.basis is not None
        k = self.left.basis.shape[1]
        user = torch.arange(len(present)).repeat_interleave(k)
        keep = present[user]
        axis = torch.arange(k).repeat(len(present))[keep]
        return Components(user[keep], torch.zeros(len(axis)), _axes(axis, self.left), _axes(axis, self.right))

    def _coords(self, rows: Tensor, side: SideCoder) -> Side:
        """Rows (m, k), brought to a largest entry of 1: the gain takes the scale up."""
        assert side.basis is not None
        scaled = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        return _side(
            torch.full((len(rows),), self.width, dtype=torch.uint8),
            torch.zeros(len(rows), dtype=torch.int64),
            quantise_coords(scaled, self.width),
            features=side.basis.shape[0],
        )


def _axes(axis: Tensor, side: SideCoder) -> Side:
    assert side.basis is not None
    features, k = side.basis.shape
    width = torch.full((len(axis),), AXIS, dtype=torch.uint8)
    return _side(width, axis, torch.zeros(0, k), features=features)


def _side(width: Tensor, axis: Tensor, coords: Tensor, *, features: int) -> Side:
    return Side(
        coords_width=width,
        own_width=torch.zeros(len(width), dtype=torch.uint8),
        axis=axis,
        coords=coords,
        own=torch.zeros(0, features),
        beta=torch.zeros(len(width)),
    )
