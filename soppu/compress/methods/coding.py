"""The coding pass: a batch of users becomes components, with the error each user is left with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.codec.basis import Bases
from soppu.compress.codec.page import Page, PageWriter
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Batch, Fleet
from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.numbers.allocate import Menu, Sides, choose
from soppu.compress.numbers.coders import SideCoder, with_gains
from soppu.compress.numbers.components import Components, Side, concatenate
from soppu.compress.numbers.errors import squared_errors
from soppu.compress.numbers.quantise import quantise_coords

_CANCELLED = 1e-6  # a squared error below this share was the difference of sums, and has lost its digits


@dataclass(frozen=True, eq=False)
class Coder(ABC):
    """What codes the users of one cluster at one module."""

    left: SideCoder
    right: SideCoder
    whitener: Whitener | None  # weighs errors on the input side

    @property
    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """Output and input basis as stored."""
        return self.left.basis, self.right.basis

    def code(self, factors: Canonical, norm: Tensor, price: Tensor) -> tuple[Components, Tensor]:
        """The components of b users and their squared errors in the metric of the fit, (b,)."""
        parts = self._parts(factors, norm, price)
        return with_gains(factors, parts, self.bases, norm=norm, whitener=self.whitener)

    @abstractmethod
    def _parts(self, factors: Canonical, norm: Tensor, price: Tensor) -> Components:
        """The components, their gains still to be found."""


@dataclass(frozen=True, eq=False)
class ModuleCoder(Coder):
    """Codes every singular component in the cheapest of the forms of two menus, that of either side."""

    menus: tuple[Menu, Menu]

    def _parts(self, factors: Canonical, norm: Tensor, price: Tensor) -> Components:
        user, x, stored, sides = self._rows(factors, norm)
        choice = choose(sides, *self.menus, price[user])
        keep = choice.keep & (sides.energy > 0)
        (left, out), (right, inn) = zip(self.menus, (choice.out[keep], choice.inn[keep]), strict=True)
        return Components(
            user=user[keep],
            gain=torch.zeros(int(keep.sum())),
            left=self.left.code(x[keep], left.coords_width[out], left.own_width[out]),
            right=self.right.code(stored[keep], right.coords_width[inn], right.own_width[inn]),
        )

    def sides(self, factors: Canonical, norm: Tensor) -> Sides:
        """What decides how the components of b users are coded; nothing is coded."""
        return self._rows(factors, norm)[3]

    def _rows(self, factors: Canonical, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Sides]:
        """Whose components, their left and right vectors as stored, and where these stand to the bases."""
        users, r = factors.s.shape
        user = torch.arange(users).repeat_interleave(r)
        x, y = factors.X.mT.flatten(0, 1), factors.Y.mT.flatten(0, 1)
        energy = factors.s.double().reshape(-1).square() / norm[user].square().clamp(min=1e-300)
        stored = y if self.whitener is None else self.whitener.back(y).float()
        rho_in = _inside(y, stored, self.right, self.whitener)
        sides = Sides(energy.float(), _inside(x, x, self.left), rho_in, stored.square().sum(1))
        return user, x, stored, sides


def _inside(rows: Tensor, stored: Tensor, coder: SideCoder, whitener: Whitener | None = None) -> Tensor:
    """(m,) energy of unit rows inside the basis as stored."""
    if coder.basis is None or coder.solve is None:
        return torch.zeros(len(rows))
    near = (stored @ coder.solve.mT) @ coder.basis.mT
    near = near if whitener is None else whitener.forward(near)
    return (1 - (rows - near).square().sum(1)).clamp(min=0).float()


@dataclass(frozen=True, eq=False)
class CoreCoder(Coder):
    """Codes the deltas of one module inside one pair of bases; the price of a bit changes nothing."""

    width: int  # of the coordinates
    diagonal: bool  # whether cores are diagonal, as JD-Diag makes them

    def _parts(self, factors: Canonical, norm: Tensor, price: Tensor) -> Components:
        assert self.left.solve is not None and self.right.solve is not None
        k_out, k_in = len(self.left.solve), len(self.right.solve)
        present = (factors.s[:, 0] > 0).nonzero()[:, 0]
        user, axis = present.repeat_interleave(k_out), torch.arange(k_out).repeat(len(present))
        if self.diagonal:
            sides = self.left.axes(axis), self.right.axes(axis)
            return Components(user, torch.zeros(len(user)), *sides)
        x = factors.X.mT @ self.left.solve.mT
        stored = factors.Y.mT if self.whitener is None else self.whitener.back(factors.Y.mT).to(x.dtype)
        cores = (x * factors.s[:, :, None]).mT @ (stored @ self.right.solve.mT)
        count = (factors.s > 0).sum(1)
        if k_out * k_in <= (k_out + k_in) * min(int(count.max()), k_out, k_in):
            rows = self._coords(cores[present].flatten(0, 1), self.right)
            return Components(user, torch.zeros(len(user)), self.left.axes(axis), rows)
        p, sigma, qt = torch.linalg.svd(cores.double(), full_matrices=False)
        keep = (torch.arange(sigma.shape[1]) < count[:, None]) & (sigma > 0)
        user = keep.nonzero()[:, 0]
        left, right = self._coords(p.mT[keep].float(), self.left), self._coords(qt[keep].float(), self.right)
        return Components(user, torch.zeros(len(user)), left, right)

    def _coords(self, rows: Tensor, side: SideCoder) -> Side:
        """Rows (m, k), brought to a largest entry of 1: the gain takes the scale up."""
        assert side.basis is not None
        scaled = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        width = torch.full((len(rows),), self.width, dtype=torch.uint8)
        return Side.of_coordinates(quantise_coords(scaled, self.width), width, features=len(side.basis))


@dataclass(frozen=True, eq=False)
class Fit:
    """A compressed fleet: what every method gives back."""

    bases: Mapping[str, tuple[Bases, ...]]  # module -> of every cluster; in a module all have the same ranks
    cluster: Tensor  # (n,) int64 whose bases a user's coordinates refer to
    pages: tuple[Page, ...]  # all users, in order
    squared: Tensor  # (modules, n) float64 squared Frobenius errors as stored
    certificates: Mapping[str, Certificate]  # module -> what a shared basis of this rank can do at all
    steps: Mapping[str, int]  # module -> alternations made
    numbers: int  # how many numbers bases and components hold
    storage: str  # how they are kept, in words


@dataclass(frozen=True, eq=False)
class Coding:
    """How a whole fleet is coded, and what else its Fit says."""

    bases: Mapping[str, tuple[Bases, ...]]
    coders: Mapping[str, tuple[Coder, ...]]  # module -> the coder of every cluster
    cluster: Tensor
    certificates: Mapping[str, Certificate]
    steps: Mapping[str, int]
    storage: str

    def run(self, passes: Passes, prices: Tensor, *, progress: Progress, note: str) -> Fit:
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
        return Fit(
            bases=self.bases,
            cluster=self.cluster,
            pages=writer.close(),
            squared=squared,
            certificates=self.certificates,
            steps=self.steps,
            numbers=writer.numbers + shared,
            storage=self.storage,
        )

    def _module(self, name: str, batch: Batch, passes: Passes, price: Tensor) -> tuple[Components, Tensor]:
        """Components of one module, users numbered from 0, and (b,) squared errors as stored.

        Users are coded cluster by cluster, and put back into their order.
        """
        here = slice(batch.first, batch.first + batch.size)
        norm, cluster = passes.fleet.norm[here], self.cluster[here]
        form = passes.form(batch, name).cpu()  # integers and bytes are made there
        parts, squared = [], torch.zeros(batch.size, dtype=torch.float64)
        for number in cluster.unique().tolist():
            coder, users = self.coders[name][number], (cluster == number).nonzero()[:, 0]
            own = form if len(users) == batch.size else form.of(users)
            part, squared[users] = coder.code(own, norm[users], price[users])
            small = squared[users] < _CANCELLED * own.norm.square()
            if coder.whitener is not None or bool(small.any()):
                B, A = (side[users].cpu() for side in batch.factors(name))
                squared[users] = squared_errors(B, A, part, coder.bases, norm=norm[users])
            parts.append(part.renumbered(users))
        whole = concatenate(parts)
        if len(parts) > 1:
            whole = whole.select(torch.argsort(whole.user, stable=True))
        return whole, squared


def nothing_shared(fleet: Fleet) -> dict[str, Certificate]:
    """Module -> the certificate of a fleet without bases."""
    counts = (fleet.norms > 0).sum(1).tolist()
    return {name: Certificate.without_basis(n) for name, n in zip(fleet.shapes, counts, strict=True)}
