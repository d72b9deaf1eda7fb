"""How much basis a module is worth: its ranks and widths, chosen by what the users' components save.

Decides with the model of `soppu.compress.numbers.allocate`; nothing is coded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.compress.numbers.allocate import Choice, Costs, Menu, Sides, choose, menu

RANKS = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
BASIS_WIDTHS = (4, 5, 6, 8)
_STARTS = (0, 16)
_SWEEPS = 2


@dataclass(frozen=True)
class ModulePlan:
    """Ranks and widths of one module's bases."""

    k_out: int = 0
    k_in: int = 0
    width_out: int = 8
    width_in: int = 8

    def menus(self, o: int, i: int, costs: Costs, *, shared_only: bool = False) -> tuple[Menu, Menu]:
        """The forms of both sides of a module; `shared_only` leaves out those with own numbers."""
        out = menu(o, self.k_out, costs, shared_only=shared_only)
        return out, menu(i, self.k_in, costs, shared_only=shared_only)


@dataclass(frozen=True, eq=False)
class ModuleStats:
    """What is known of the components of all users at one module, before any is coded."""

    out: int  # features of the output side
    inn: int  # features of the input side
    user: Tensor  # (m,) whose component it is
    energy: Tensor  # (m,) squared singular value over the user's whole squared norm
    missed_out: Tensor  # (m, len(ranks)) share of the left vector outside the first ranks[j] basis vectors
    missed_in: Tensor  # (m, len(ranks)) the same on the input side
    weight_in: Tensor  # (m,) squared length of the right vector as stored
    ranks: tuple[int, ...]  # the ranks that the columns speak of, ascending, the first 0

    def pick(self, plan: ModulePlan, costs: Costs, multiplier: Tensor | float) -> Choice:
        """The best form of every component as seen from the bases of `plan`, whose rounding is missed too."""
        rho_out = self._inside(self.missed_out, plan.k_out, costs.distortion[plan.width_out])
        rho_in = self._inside(self.missed_in, plan.k_in, costs.distortion[plan.width_in])
        sides = Sides(self.energy, rho_out, rho_in, self.weight_in)
        return choose(sides, *plan.menus(self.out, self.inn, costs), multiplier)

    def _inside(self, missed: Tensor, k: int, noise: float) -> Tensor:
        if not k:
            return torch.zeros(len(missed))
        return (1 - missed[:, self.ranks.index(k)].float()) * (1 - noise)

    def basis_bits(self, plan: ModulePlan, costs: Costs) -> float:
        """Bits both bases take."""
        out = plan.k_out * self.out * costs.rate[plan.width_out]
        return out + plan.k_in * self.inn * costs.rate[plan.width_in]

    def sample(self, users: int) -> ModuleStats:
        """The components of the first `users` users."""
        keep = self.user < users
        return replace(self, **{name: getattr(self, name)[keep] for name in COLUMNS})


COLUMNS = ("user", "energy", "missed_out", "missed_in", "weight_in")  # of ModuleStats: an entry a component


def best(
    stats: ModuleStats, costs: Costs, *, multiplier: float, share: float, start: ModulePlan | None
) -> ModulePlan:
    """Ranks and widths with the least cost for a module, by coordinate descent.

    Args:
        stats: of a sample of users, `share` of all.
        multiplier: squared relative error one bit has to save.
        start: a plan to start from, where an earlier multiplier gave one; else there are several starts.
    """

    def cost(plan: ModulePlan) -> float:
        choice = stats.pick(plan, costs, multiplier)
        users = float(choice.error.sum()) + multiplier * float(choice.bits.sum())
        return users / share + multiplier * stats.basis_bits(plan, costs)

    largest = sorted({max(k for k in stats.ranks if k <= most) for most in _STARTS})
    starts = [start] if start else [ModulePlan(k, k, 5, 5) for k in largest]
    return min((_descend(plan, cost, stats.ranks) for plan in starts), key=lambda pair: pair[0])[1]


def _descend(
    plan: ModulePlan, cost: Callable[[ModulePlan], float], ranks: Sequence[int]
) -> tuple[float, ModulePlan]:
    least = cost(plan)
    for _ in range(_SWEEPS):
        before = plan
        for side in ("out", "in"):
            options = [{f"k_{side}": k} for k in ranks] + [{f"width_{side}": w} for w in BASIS_WIDTHS]
            for change in options:
                other = replace(plan, **change)
                if other != plan and (found := cost(other)) < least:
                    least, plan = found, other
        if plan == before:
            break
    return least, plan


def bisect(bits: Callable[[float], float], target: float, *, steps: int = 28) -> float:
    """The smallest multiplier, on a logarithmic scale, at which no more than `target` bits are spent."""
    low, high = -20.0, 2.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if bits(10.0**middle) > target else (low, middle)
    return 10.0**high


def total_bits(
    stats: Sequence[ModuleStats], plans: Sequence[ModulePlan], costs: Costs, multiplier: float
) -> float:
    """Bits of all components and bases. O(components)."""
    return sum(
        float(one.pick(plan, costs, multiplier).bits.double().sum()) + one.basis_bits(plan, costs)
        for one, plan in zip(stats, plans, strict=True)
    )


def user_errors(
    stats: Sequence[ModuleStats], plans: Sequence[ModulePlan], costs: Costs, multiplier: Tensor
) -> Tensor:
    """(n,) squared relative error expected of every user, at a multiplier for each. O(components)."""
    error = torch.zeros(len(multiplier), dtype=torch.float64)
    for one, plan in zip(stats, plans, strict=True):
        error.index_add_(0, one.user, one.pick(plan, costs, multiplier[one.user]).error.double())
    return error
