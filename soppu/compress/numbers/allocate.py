"""Bits where they buy the most: every component's two sides get a form under one Lagrange multiplier.

A component with relative energy e = s^2 / ||D||^2 whose sides keep squared errors D_u and D_v costs

    J = e (1 - (1 - D_u)(1 - D_v)) + lambda (bits_u + bits_v + overhead),    or e where it is left out,

because components of one adapter are orthogonal and quantisation errors are not correlated. Minimising J
for one lambda over all users, modules and components is the convex hull of what can be reached at all
(Shoham & Gersho, IEEE Trans. ASSP 36(9), 1988; reverse water-filling with real quantisers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.numbers.costs import Costs
from soppu.compress.numbers.quantise import COORDS

_OVERHEAD = 24.0  # bits: gain and modes of one component
_BETA = 16.0  # bits: the weight of an own part beside coordinates
_ROUNDS = 3
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Menu:
    """The forms one side of a component may take, one entry of every (O,) tensor each.

    The squared error of form f is own_f w + missed_f (1 - rho) + both_f (1 - rho) w + fixed_f, with rho the
    energy of the side inside the basis and w the weight of white noise on it (1 unless whitened).
    """

    coords_width: Tensor
    own_width: Tensor
    bits: Tensor
    own: Tensor
    missed: Tensor
    both: Tensor
    fixed: Tensor

    def errors(self, rho: Tensor, weight: Tensor) -> Tensor:
        """(m, O) squared errors of m sides. O(m O)."""
        rest = (1 - rho).clamp(min=0)[:, None]
        w = weight[:, None]
        return (self.own * w + self.missed * rest + self.both * rest * w + self.fixed).clamp(max=1.0)


def menu(features: int, k: int, costs: Costs, *, widths: Sequence[int], shared_only: bool = False) -> Menu:
    """All forms of a side with `features` numbers, or k coordinates, or both. O(widths)."""
    rows: list[tuple[float, ...]] = []
    if not shared_only:
        rows += [(0, w, features * costs.rate[w], costs.distortion[w], 0, 0, 0) for w in widths]
    for c, limit in COORDS.items() if k else ():
        bits, noise = k * coords_rate(k, c) * costs.coords, k / (12 * limit**2)
        rows.append((c, 0, bits, 0, 1, 0, noise))
        if c > 4 and not shared_only:
            rows += [
                (c, w, bits + _BETA + features * costs.rate[w], 0, 0, costs.distortion[w], noise)
                for w in widths
            ]
    columns = torch.tensor(rows, dtype=torch.float32).T
    return Menu(columns[0].to(torch.uint8), columns[1].to(torch.uint8), *columns[2:])


def coords_rate(k: int, width: int) -> float:
    """Bits of one of k coordinates of a unit vector, as if Gaussian, rounded to a width's steps."""
    deviation = COORDS[width] / math.sqrt(k)
    return max(0.5 * math.log2(1 + 2 * math.pi * math.e * deviation**2), 0.3)


@dataclass(frozen=True, eq=False)
class Sides:
    """What is known of m components of one module before they are coded.

    Attributes:
        energy: (m,) squared singular value over the user's whole squared norm.
        rho_out: (m,) share of the left vector inside the output basis.
        rho_in: (m,) the same on the input side.
        weight_in: (m,) squared length of the right vector as it is stored, 1 unless whitened.
    """

    energy: Tensor
    rho_out: Tensor
    rho_in: Tensor
    weight_in: Tensor


@dataclass(frozen=True, eq=False)
class Choice:
    """The form of m components: places in the two menus, whether to keep, error and bits expected."""

    out: Tensor
    inn: Tensor
    keep: Tensor
    error: Tensor
    bits: Tensor


def choose(sides: Sides, left: Menu, right: Menu, multiplier: Tensor | float) -> Choice:
    """The best form of every component at this multiplier, one or (m,). O(m O).

    The two sides are settled in turn, three times over, from the other side free of error.
    """
    size = len(sides.energy)
    price = torch.as_tensor(multiplier, dtype=torch.float32).expand(size)
    parts = [
        _choose(_slice(sides, start), left, right, price[start : start + _CHUNK])
        for start in range(0, max(size, 1), _CHUNK)
    ]
    return Choice(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _choose(sides: Sides, left: Menu, right: Menu, price: Tensor) -> tuple[Tensor, ...]:
    errors_out = left.errors(sides.rho_out, torch.ones_like(sides.rho_out))
    errors_in = right.errors(sides.rho_in, sides.weight_in)
    lost_in = torch.zeros_like(sides.energy)
    out = inn = torch.zeros(len(lost_in), dtype=torch.int64)
    for _ in range(_ROUNDS):
        value = (sides.energy * (1 - lost_in))[:, None]
        out = (value * errors_out + price[:, None] * left.bits).argmin(1)
        lost_out = errors_out.gather(1, out[:, None])[:, 0]
        value = (sides.energy * (1 - lost_out))[:, None]
        inn = (value * errors_in + price[:, None] * right.bits).argmin(1)
        lost_in = errors_in.gather(1, inn[:, None])[:, 0]
    error = sides.energy * (1 - (1 - lost_out) * (1 - lost_in))
    bits = left.bits[out] + right.bits[inn] + _OVERHEAD
    keep = error + price * bits < sides.energy
    return out, inn, keep, torch.where(keep, error, sides.energy), torch.where(keep, bits, 0.0)


def _slice(sides: Sides, start: int) -> Sides:
    part = slice(start, start + _CHUNK)
    return Sides(sides.energy[part], sides.rho_out[part], sides.rho_in[part], sides.weight_in[part])
