"""Bits where they buy the most: every component's two sides get a form under one Lagrange multiplier.

A component with relative energy e = s^2 / ||D||^2 whose sides keep squared errors D_u and D_v costs

    J = e (1 - (1 - D_u)(1 - D_v)) + lambda (bits_u + bits_v + overhead),    or e where it is left out,

because components of one adapter are orthogonal and quantisation errors are not correlated. Minimising J
for one lambda over all users, modules and components is the convex hull of what can be reached at all
(Shoham & Gersho, IEEE Trans. ASSP 36(9), 1988; reverse water-filling with real quantisers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from soppu.compress.numbers.quantise import COORDS, FLOATS, QUANTISERS, quantise, scale_of

_FLOAT_DISTORTION = {16: 2.0**-24, 32: 2.0**-48}
_OVERHEAD = 24.0  # bits: gain and modes of one component
_BETA = 16.0  # bits: the weight of an own part beside coordinates
_ROUNDS = 3
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Costs:
    """What numbers cost in bits and lose in precision; Gaussian numbers unless measured."""

    rate: Mapping[int, float] = field(  # width -> bits a number
        default_factory=lambda: {w: q.rate for w, q in QUANTISERS.items()} | {w: float(w) for w in FLOATS}
    )
    distortion: Mapping[int, float] = field(  # width -> share of squared error left
        default_factory=lambda: {w: q.distortion for w, q in QUANTISERS.items()} | _FLOAT_DISTORTION
    )


def measure(rows: Sequence[Tensor]) -> Costs:
    """Costs of vectors like these: tensors (m, d), zero rows left out. O(widths size)."""
    costs = Costs()
    rate, distortion = dict(costs.rate), dict(costs.distortion)
    used = [part[part.square().sum(1) > 0] for part in rows]
    numbers = sum(part.numel() for part in used)
    for width in QUANTISERS if numbers else ():
        counts, lost = torch.zeros(256, dtype=torch.float64), 0.0
        for part in used:
            q = quantise(part, width)
            rest = part - scale_of(part, q)[:, None] * q
            lost += float((rest.square().sum(1) / part.square().sum(1)).sum())
            counts += torch.bincount((q + 128).long().reshape(-1), minlength=256)
        shares = counts[counts > 0] / numbers
        rate[width] = max(float(-(shares * shares.log2()).sum()) * 1.01, 0.35)
        distortion[width] = lost / sum(map(len, used))
    return Costs(rate, distortion)


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


@lru_cache(maxsize=256)
def menu(features: int, k: int, costs: Costs, *, shared_only: bool = False) -> Menu:
    """All forms of a side with `features` numbers, or k coordinates, or both. O(widths)."""
    own = [] if shared_only else [(w, features * costs.rate[w], costs.distortion[w]) for w in costs.rate]
    rows: list[tuple[float, ...]] = [(0, w, bits, lost, 0, 0, 0) for w, bits, lost in own]
    for c, limit in COORDS.items() if k else ():
        shared, noise = k * coords_rate(k, c), k / (12 * limit**2)
        rows.append((c, 0, shared, 0, 1, 0, noise))
        if c > 4:
            rows += [(c, w, shared + _BETA + bits, 0, 0, lost, noise) for w, bits, lost in own]
    columns = torch.tensor(rows, dtype=torch.float32).T
    return Menu(columns[0].to(torch.uint8), columns[1].to(torch.uint8), *columns[2:])


def coords_rate(k: int, width: int) -> float:
    """Bits of one of k coordinates of a unit vector, as if Gaussian, rounded to a width's steps."""
    deviation = COORDS[width] / math.sqrt(k)
    return max(0.5 * math.log2(1 + 2 * math.pi * math.e * deviation**2), 0.3)


@dataclass(frozen=True, eq=False)
class Sides:
    """What is known of m components of one module before they are coded."""

    energy: Tensor  # (m,) squared singular value over the user's whole squared norm
    rho_out: Tensor  # (m,) share of the left vector inside the output basis
    rho_in: Tensor  # (m,) the same on the input side
    weight_in: Tensor  # (m,) squared length of the right vector as it is stored, 1 unless whitened


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
    price = torch.as_tensor(multiplier, dtype=torch.float32).expand(len(sides.energy))
    pieces = (column.split(_CHUNK) for column in (*vars(sides).values(), price))
    parts = [_choose(Sides(*four), left, right, one) for *four, one in zip(*pieces, strict=True)]
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
