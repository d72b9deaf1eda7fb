"""Components: what a bundle keeps of its users at one module, before it becomes bytes and after.

A user's change is a sum of rank-one components, D_n ~ norm_n * sum_j gain_j u_j v_j^T, and each of the two
sides u_j (o,) and v_j (i,) is the sum of what the shared basis says and what only this user has:

    u_j = U a_j + beta_j p_j / ||p_j||          a_j (k,) coordinates, p_j (o,) small integers; either may be
    absent

So one form holds every method: a shared-basis core has coordinates on both sides, a compressed LoRA its own
numbers on both, and between them lie components that share one side, or have their own numbers only where the
basis falls short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.compress.numbers.quantise import AXIS


@dataclass(frozen=True, eq=False)
class Side:
    """One side of m components at a module with d features and a basis of rank k."""

    coords_width: Tensor  # (m,) uint8, 0 = no coordinates, AXIS = a unit vector that takes no bits
    own_width: Tensor  # (m,) uint8 width of the user's own numbers, 0 = none
    axis: Tensor  # (m,) int64 which unit vector, where `coords_width` is AXIS; elsewhere 0
    coords: Tensor  # (those with a width above AXIS, k) float32
    own: Tensor  # (those with an own width, d) float32 of integers, or floats for widths 16 and 32
    beta: Tensor  # (m,) float32 weight of the own part; 1 without coordinates, 0 where nothing is own

    @classmethod
    def of_axes(cls, axis: Tensor, *, features: int, k: int) -> Side:
        """The basis vectors at the places `axis` (m,), which take no bits."""
        width = torch.full((len(axis),), AXIS, dtype=torch.uint8)
        return replace(cls.of_coordinates(torch.zeros(0, k), width, features=features), axis=axis)

    @classmethod
    def of_coordinates(cls, coords: Tensor, width: Tensor, *, features: int) -> Side:
        """Sides in the basis alone, from coordinates of these widths, (m,) uint8."""
        return cls(
            coords_width=width,
            own_width=torch.zeros(len(width), dtype=torch.uint8),
            axis=torch.zeros(len(width), dtype=torch.int64),
            coords=coords,
            own=torch.zeros(0, features),
            beta=torch.zeros(len(width)),
        )

    @classmethod
    def of_own(cls, rows: Tensor, width: int) -> Side:
        """Sides without a basis, from the users' own numbers (m, d), all of one width."""
        m = len(rows)
        return cls(
            coords_width=torch.zeros(m, dtype=torch.uint8),
            own_width=torch.full((m,), width, dtype=torch.uint8),
            axis=torch.zeros(m, dtype=torch.int64),
            coords=torch.zeros(0, 0),
            own=rows,
            beta=torch.ones(m),
        )

    def vectors(self, basis: Tensor | None) -> Tensor:
        """The sides themselves, (m, d) float32, not normalised. O(m d k).

        Args:
            basis: (d, k); may be None where no component has coordinates.
        """
        made = self.own.new_zeros((len(self.beta), self.own.shape[1]))
        if basis is not None:
            coded = self.coords_width > AXIS
            made[coded] = self.coords @ basis.mT
            axis = self.coords_width == AXIS
            made[axis] = basis.mT[self.axis[axis]]
        has = self.own_width > 0
        made[has] += unit(self.own) * self.beta[has, None]
        return made

    def coordinates(self, k: int) -> Tensor:
        """(m, k) coordinates in the basis, zero where there are none. O(m k)."""
        made = self.coords.new_zeros((len(self.beta), k))
        made[self.coords_width > AXIS] = self.coords
        axis = self.coords_width == AXIS
        made[axis, self.axis[axis]] = 1.0
        return made

    def select(self, chosen: Tensor) -> Side:
        """The components at the places `chosen`, in that order."""
        return Side(
            coords_width=self.coords_width[chosen],
            own_width=self.own_width[chosen],
            axis=self.axis[chosen],
            coords=self.coords[_among(self.coords_width > AXIS, chosen)],
            own=self.own[_among(self.own_width > 0, chosen)],
            beta=self.beta[chosen],
        )


def _among(has: Tensor, chosen: Tensor) -> Tensor:
    """Where the chosen ones of those that have something stand among these."""
    return (torch.cumsum(has, 0) - 1)[chosen[has[chosen]]]


@dataclass(frozen=True, eq=False)
class Components:
    """m components of some users at one module, ordered by user."""

    user: Tensor  # (m,) int64 whose component it is
    gain: Tensor  # (m,) float32, relative to the user's norm
    left: Side  # of the output
    right: Side  # of the input

    def __len__(self) -> int:
        return len(self.user)

    @property
    def own(self) -> Tensor:
        """(m,) whether a component has numbers of its own on either side."""
        return (self.left.own_width > 0) | (self.right.own_width > 0)

    def select(self, which: Tensor) -> Components:
        """The components where `which` (m,) is True, or those at the places it names, in that order."""
        chosen = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        sides = self.left.select(chosen), self.right.select(chosen)
        return Components(self.user[chosen], self.gain[chosen], *sides)

    def renumbered(self, users: Tensor) -> Components:
        """The same with user numbers `users[old]`."""
        return replace(self, user=users[self.user])


def unit(rows: Tensor) -> Tensor:
    """Rows (m, d) brought to length 1; zero rows stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def ordinals(user: Tensor) -> Tensor:
    """Which component of its user each is, for components ordered by user: (m,)."""
    counts = torch.bincount(user)
    starts = torch.cumsum(counts, 0) - counts
    return torch.arange(len(user)) - starts[user]


def spread(rows: Tensor, user: Tensor, *, users: int) -> Tensor:
    """Rows (m, d) of components ordered by user, user by user: (users, c, d) float64, padded with zeros.

    c is the largest number of components a user has.
    """
    width = int(torch.bincount(user).max()) if len(user) else 0
    grid = rows.new_zeros((users, width, rows.shape[1]), dtype=torch.float64)
    grid[user, ordinals(user)] = rows.double()
    return grid


def concatenate(parts: Sequence[Components]) -> Components:
    """The components of several groups of users in a row. O(size)."""
    return Components(
        user=torch.cat([part.user for part in parts]),
        gain=torch.cat([part.gain for part in parts]),
        left=_concatenate([part.left for part in parts]),
        right=_concatenate([part.right for part in parts]),
    )


def _concatenate(sides: Sequence[Side]) -> Side:
    return Side(*(torch.cat(column) for column in zip(*(vars(side).values() for side in sides), strict=True)))
