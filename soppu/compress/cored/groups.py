"""Some users of one batch that are told alike: cores in one basis, or pairs that are projected onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.cored.kept import KeptBasis, View
from soppu.compress.fleet.survey import delta_norm
from soppu.compress.numbers.components import Components
from soppu.compress.numbers.errors import squared_errors, squared_norms
from soppu.cores.core import CoreAdapter


@dataclass(frozen=True, eq=False)
class Group(ABC):
    """Users by their places in the batch, (g,) in order."""

    places: Tensor
    kept: KeptBasis

    @abstractmethod
    def cores(self, name: str) -> Tensor:
        """The nearest cores in the kept basis, (g, k_out, k_in) float64."""

    @abstractmethod
    def ranks(self, name: str) -> list[int]:
        """Rank of everybody's change at a module, told in pairs; 0 where a user does not have it."""

    @abstractmethod
    def energy(self, name: str) -> Tensor:
        """Squared norm of everybody's change at a module, (g,) float64."""

    @abstractmethod
    def squared_errors(self, name: str, part: Components, kept: Tensor, norm: Tensor) -> Tensor:
        """Squared errors (g,) float64 against components as stored.

        Args:
            part: the group's components, its users numbered from 0.
            kept: the cores (g, k_out, k_in) among them, as a reader makes them.
            norm: (g,) what gains are relative to.
        """

    def own(self, name: str) -> Mapping[int, LoraPair]:
        """What users have beside the basis, by their number in the group."""
        return {}

    def outside(self) -> Tensor:
        """Squared norm (g,) of what users change at modules that the basis lacks."""
        return torch.zeros(len(self.places), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Cores(Group):
    """Users whose cores are told in one basis, which need not be the kept one."""

    members: Sequence[CoreAdapter]
    views: Mapping[str, View]

    def cores(self, name: str) -> Tensor:
        """The cores as they are told, turned to the kept basis."""
        return self.views[name].turn(self._told(name))

    def ranks(self, name: str) -> list[int]:
        """Rank of the core in pairs, and of what is beside it."""
        inside = min(self.members[0].cores[name].shape)
        return [inside + (one.own[name].rank if name in one.own else 0) for one in self.members]

    def energy(self, name: str) -> Tensor:
        """By roots of the basis; in full for who has something beside it."""
        told = self._told(name)
        found = self.views[name].energy(told)
        for number, own in self.own(name).items():
            left, right = self._factors(name, told[number], own)
            found[number] = delta_norm(left, right) ** 2
        return found

    def squared_errors(self, name: str, part: Components, kept: Tensor, norm: Tensor) -> Tensor:
        """By roots of the two bases; in full for who has something beside them."""
        told = self._told(name)
        found = self.views[name].squared_errors(told, kept)
        for number, own in self.own(name).items():
            left, right = self._factors(name, told[number], own)
            here = part.select(part.user == number).renumbered(torch.zeros(number + 1, dtype=torch.int64))
            one = norm[number : number + 1]
            found[number] = squared_errors(left[None], right[None], here, self.kept.sides[name], norm=one)[0]
        return found

    def own(self, name: str) -> Mapping[int, LoraPair]:
        """What users have beside the basis."""
        return {number: one.own[name] for number, one in enumerate(self.members) if name in one.own}

    def _told(self, name: str) -> Tensor:
        return torch.stack([one.cores[name] for one in self.members])

    def _factors(self, name: str, core: Tensor, own: LoraPair) -> tuple[Tensor, Tensor]:
        """U S V^T + B A in two factors, float64."""
        u, v = (side.double() for side in self.views[name].sides)
        left = torch.cat([u @ core.double(), own.B.double()], 1)
        return left, torch.cat([v.mT, own.A.double()])


@dataclass(frozen=True, eq=False)
class Pairs(Group):
    """Users whose adapters were trained freely: what of them the kept basis spans."""

    members: Sequence[LoraAdapter]

    def cores(self, name: str) -> Tensor:
        """What the kept basis spans of every adapter."""
        solve_u, solve_v = self.kept.solve[name]
        made = torch.zeros(len(self.members), len(solve_u), len(solve_v), dtype=torch.float64)
        for number, one in enumerate(self.members):
            if pair := one.pairs.get(name):
                made[number] = (solve_u @ pair.B.double()) @ (pair.A.double() @ solve_v.mT)
        return made

    def ranks(self, name: str) -> list[int]:
        """Ranks as trained."""
        return [one.pairs[name].rank if name in one.pairs else 0 for one in self.members]

    def energy(self, name: str) -> Tensor:
        """Squared norms of the deltas."""
        return torch.tensor([_energy(one.pairs.get(name)) for one in self.members], dtype=torch.float64)

    def squared_errors(self, name: str, part: Components, kept: Tensor, norm: Tensor) -> Tensor:
        """Of the deltas against what is kept of them."""
        u, v = (side.double() for side in self.kept.sides[name])
        found = torch.zeros(len(self.members), dtype=torch.float64)
        for number, one in enumerate(self.members):
            if pair := one.pairs.get(name):
                left = torch.cat([pair.B.double(), -(u @ kept[number])], 1)
                found[number] = squared_norms(left, torch.cat([pair.A.double(), v.mT]))
        return found

    def outside(self) -> Tensor:
        """Of modules that the basis lacks."""
        known = self.kept.sides.keys()
        left = [[_energy(one.pairs[name]) for name in one.pairs.keys() - known] for one in self.members]
        return torch.tensor([sum(sizes) for sizes in left], dtype=torch.float64)


def _energy(pair: LoraPair | None) -> float:
    return delta_norm(pair.B, pair.A) ** 2 if pair else 0.0
