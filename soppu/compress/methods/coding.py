"""The coding pass of the default method: a batch of users becomes components, with the error each user is
left with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from soppu.compress.codec.basis import Bases
from soppu.compress.codec.page import Page, PageWriter
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Batch
from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.numbers.allocate import Menu, Sides, choose
from soppu.compress.numbers.coders import SideCoder, with_gains
from soppu.compress.numbers.components import Components, concatenate
from soppu.compress.numbers.errors import squared_errors


@dataclass(frozen=True, eq=False)
class ModuleCoder:
    """Everything the coding of one module needs."""

    left: SideCoder
    right: SideCoder
    menus: tuple[Menu, Menu]
    whitener: Whitener | None

    def code(self, factors: Canonical, norm: Tensor, price: Tensor) -> tuple[Components, Tensor]:
        """The components of b users and their squared errors in the metric of the fit, (b,)."""
        user, x, stored, sides = self._rows(factors, norm)
        choice = choose(sides, *self.menus, price[user])
        keep = choice.keep & (sides.energy > 0)
        out, inn = choice.out[keep], choice.inn[keep]
        parts = Components(
            user=user[keep],
            gain=torch.zeros(int(keep.sum())),
            left=self.left.code(x[keep], self.menus[0].coords_width[out], self.menus[0].own_width[out]),
            right=self.right.code(
                stored[keep], self.menus[1].coords_width[inn], self.menus[1].own_width[inn]
            ),
        )
        bases = (self.left.basis, self.right.basis)
        return with_gains(factors, parts, bases, norm=norm, whitener=self.whitener)

    def sides(self, factors: Canonical, norm: Tensor) -> Sides:
        """What decides how the components of b users are coded; nothing is coded."""
        return self._rows(factors, norm)[3]

    def _rows(self, factors: Canonical, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Sides]:
        """Whose components, their left and right vectors as stored, and where these stand to the bases."""
        users, r = factors.s.shape
        user = torch.arange(users).repeat_interleave(r)
        x = factors.X.mT.reshape(users * r, -1)
        y = factors.Y.mT.reshape(users * r, -1)
        energy = factors.s.double().reshape(-1).square() / norm[user].square().clamp(min=1e-300)
        stored = y if self.whitener is None else self.whitener.back(y).float()
        weight = stored.square().sum(1)
        return (
            user,
            x,
            stored,
            Sides(energy.float(), _inside(x, self.left), self._inside_in(stored, y), weight),
        )

    def _inside_in(self, stored: Tensor, y: Tensor) -> Tensor:
        if self.whitener is None:
            return _inside(y, self.right)
        if self.right.basis is None or self.right.solve is None:
            return torch.zeros(len(y))
        near = self.whitener.forward((stored @ self.right.solve.mT) @ self.right.basis.mT)
        return (1 - (y.double() - near).square().sum(1)).clamp(min=0).float()


def _inside(rows: Tensor, coder: SideCoder) -> Tensor:
    """(m,) energy of unit rows inside the basis as stored."""
    if coder.basis is None or coder.solve is None:
        return torch.zeros(len(rows))
    near = (rows @ coder.solve.mT) @ coder.basis.mT
    return (1 - (rows - near).square().sum(1)).clamp(min=0)


_CANCELLED = 1e-6  # a squared error below this share was the difference of sums, and has lost its digits


class Coder(Protocol):
    """What codes the users of one cluster at one module."""

    @property
    def left(self) -> SideCoder:
        """Of the output side."""

    @property
    def right(self) -> SideCoder:
        """Of the input side."""

    @property
    def whitener(self) -> Whitener | None:
        """Weighs errors on the input side."""

    def code(self, factors: Canonical, norm: Tensor, price: Tensor) -> tuple[Components, Tensor]:
        """The components of b users and their squared errors in the metric of the fit, (b,)."""
        ...


@dataclass(frozen=True, eq=False)
class Coding:
    """How a whole fleet is coded.

    Attributes:
        bases: module -> output and input basis of every cluster.
        coders: module -> the coder of every cluster.
        cluster: (n,) int64 which cluster a user is in.
        norm: (n,) what gains are relative to.
    """

    bases: Mapping[str, tuple[Bases, ...]]
    coders: Mapping[str, tuple[Coder, ...]]
    cluster: Tensor
    norm: Tensor

    def run(self, passes: Passes, prices: Tensor, *, progress: Progress, note: str) -> Coded:
        """Code every user, `prices` (n,) the multiplier of each: one pass over the adapters."""
        fleet = passes.fleet
        writer, squared = PageWriter(), torch.zeros_like(fleet.norms)
        for batch in fleet.batches():
            users = slice(batch.first, batch.first + batch.size)
            coded = [self._module(name, batch, passes, prices[users]) for name in fleet.shapes]
            squared[:, users] = torch.stack([errors for _, errors in coded])
            writer.add([parts for parts, _ in coded], users=batch.size)
            progress(note, batch.first + batch.size, len(fleet.users))
        shared = sum(s.rows.numel() for pairs in self.bases.values() for pair in pairs for s in pair)
        return Coded(writer.close(), squared, writer.numbers + shared)

    def _module(self, name: str, batch: Batch, passes: Passes, price: Tensor) -> tuple[Components, Tensor]:
        """Components of one module, users numbered from 0, and (b,) squared errors as stored.

        Users are coded cluster by cluster, and put back into their order.
        """
        here = slice(batch.first, batch.first + batch.size)
        norm, cluster = self.norm[here], self.cluster[here]
        form = passes.form(batch, name).cpu()  # integers and bytes are made there
        parts, squared = [], torch.zeros(batch.size, dtype=torch.float64)
        for number in cluster.unique().tolist():
            coder, users = self.coders[name][number], (cluster == number).nonzero()[:, 0]
            own = form if len(users) == batch.size else form.of(users)
            part, squared[users] = coder.code(own, norm[users], price[users])
            small = squared[users] < _CANCELLED * own.norm.square()
            if coder.whitener is not None or bool(small.any()):
                B, A = (side[users].cpu() for side in batch.factors(name))
                bases = (coder.left.basis, coder.right.basis)
                squared[users] = squared_errors(B, A, part, bases, norm=norm[users])
            parts.append(part.renumbered(users))
        whole = concatenate(parts)
        if len(parts) > 1:
            whole = whole.select(torch.argsort(whole.user, stable=True))
        return whole, squared


@dataclass(frozen=True, eq=False)
class Coded:
    """What a coding pass gives: pages, (modules, n) squared errors as stored, how many numbers are kept."""

    pages: tuple[Page, ...]
    squared: Tensor
    numbers: int
