"""How much basis a module is worth: its ranks and widths, chosen by what the users' components save.

Decides with the model of `soppu.compress.numbers.allocate`; nothing is coded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soppu.compress.numbers.allocate import Choice, Menu, Sides, choose, menu
from soppu.compress.numbers.costs import Costs

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


@dataclass(frozen=True, eq=False)
class ModuleStats:
    """What is known of the components of all users at one module, before any is coded.

    Attributes:
        out: o.
        inn: i.
        user: (m,) whose component it is.
        energy: (m,) squared singular value over the user's whole squared norm.
        missed_out: (m, len(ranks)) share of the left vector outside the first ranks[j] basis vectors.
        missed_in: (m, len(ranks)) the same on the input side.
        weight_in: (m,) squared length of the right vector as stored.
        ranks: the ranks the columns speak of, ascending, the first 0.
    """

    out: int
    inn: int
    user: Tensor
    energy: Tensor
    missed_out: Tensor
    missed_in: Tensor
    weight_in: Tensor
    ranks: tuple[int, ...]

    def sides(self, plan: ModulePlan, costs: Costs) -> Sides:
        """The components as seen from the bases of `plan`, whose rounding counts as missed."""
        return Sides(
            energy=self.energy,
            rho_out=self._inside(self.missed_out, plan.k_out, costs.distortion.get(plan.width_out, 0.0)),
            rho_in=self._inside(self.missed_in, plan.k_in, costs.distortion.get(plan.width_in, 0.0)),
            weight_in=self.weight_in,
        )

    def _inside(self, missed: Tensor, k: int, noise: float) -> Tensor:
        return (
            (1 - missed[:, self.ranks.index(k)].float()) * (1 - noise)
            if k
            else missed.new_zeros(len(missed)).float()
        )

    def sample(self, users: int) -> ModuleStats:
        """The components of the first `users` users."""
        keep = self.user < users
        return replace(
            self,
            **{
                name: getattr(self, name)[keep]
                for name in ("user", "energy", "missed_out", "missed_in", "weight_in")
            },
        )


@dataclass(frozen=True)
class Setting:
    """What is the same for all modules: what numbers cost, and which widths may be used."""

    costs: Costs
    widths: tuple[int, ...]
    most_rank: int
    _menus: dict[tuple[int, int, bool], Menu] = field(default_factory=dict, repr=False, compare=False)

    def pick(self, stats: ModuleStats, plan: ModulePlan, multiplier: Tensor | float) -> Choice:
        """The best form of every component of a module."""
        left, right = self.menus(stats.out, stats.inn, plan)
        return choose(stats.sides(plan, self.costs), left, right, multiplier)

    def menus(self, out: int, inn: int, plan: ModulePlan, *, shared_only: bool = False) -> tuple[Menu, Menu]:
        """The forms of both sides of a module; `shared_only` leaves out those with own numbers."""
        sizes = ((out, plan.k_out), (inn, plan.k_in))
        left, right = (self._menu(features, k, shared_only) for features, k in sizes)
        return left, right

    def _menu(self, features: int, k: int, shared_only: bool) -> Menu:
        key = (features, k, shared_only)
        if key not in self._menus:
            self._menus[key] = menu(features, k, self.costs, widths=self.widths, shared_only=shared_only)
        return self._menus[key]

    def basis_bits(self, stats: ModuleStats, plan: ModulePlan) -> float:
        """Bits both bases of a module take."""
        rate = self.costs.rate
        return plan.k_out * stats.out * rate.get(plan.width_out, 32.0) + plan.k_in * stats.inn * rate.get(
            plan.width_in, 32.0
        )


def best(
    stats: ModuleStats, setting: Setting, *, multiplier: float, share: float, start: ModulePlan | None
) -> ModulePlan:
    """Ranks and widths with the least cost for a module, by coordinate descent.

    Args:
        stats: of a sample of users, `share` of all.
        multiplier: squared relative error one bit has to save.
        start: a plan to start from, where an earlier multiplier gave one; else there are several starts.
    """

    def cost(plan: ModulePlan) -> float:
        choice = setting.pick(stats, plan, multiplier)
        users = float(choice.error.sum()) + multiplier * float(choice.bits.sum())
        return users / share + multiplier * setting.basis_bits(stats, plan)

    allowed = [k for k in stats.ranks if k <= setting.most_rank]
    starts = (
        [start] if start else [_at(k, stats.ranks) for k in sorted({min(s, allowed[-1]) for s in _STARTS})]
    )
    found = [_descend(plan, cost, allowed) for plan in starts]
    return min(found, key=lambda pair: pair[0])[1]


def _at(start: int, ranks: Sequence[int]) -> ModulePlan:
    k = max(rank for rank in ranks if rank <= start)
    return ModulePlan(k, k, 5, 5)


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
    stats: Sequence[ModuleStats], plans: Sequence[ModulePlan], setting: Setting, multiplier: Tensor | float
) -> float:
    """Bits of all components and bases. O(components)."""
    spent = 0.0
    for one, plan in zip(stats, plans, strict=True):
        price = multiplier[one.user] if isinstance(multiplier, Tensor) else multiplier
        spent += float(setting.pick(one, plan, price).bits.double().sum()) + setting.basis_bits(one, plan)
    return spent


def user_errors(
    stats: Sequence[ModuleStats], plans: Sequence[ModulePlan], setting: Setting, multiplier: Tensor
) -> Tensor:
    """(n,) squared relative error expected of every user, at a multiplier for each. O(components)."""
    error = torch.zeros(len(multiplier), dtype=torch.float64)
    for one, plan in zip(stats, plans, strict=True):
        choice = setting.pick(one, plan, multiplier[one.user])
        error.index_add_(0, one.user, choice.error.double())
    return error
