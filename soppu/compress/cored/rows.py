"""Cores and own ranks as components of a bundle: what is kept of them, gain by gain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.compress.numbers.components import Components, Side, concatenate, spread, unit
from soppu.compress.numbers.quantise import FLOATS, quantise, quantise_coords, scale_of

EXACT = 32  # bits at which nothing is rounded: gains are then powers of 4, whose roots a reader may take


@dataclass(frozen=True, eq=False)
class Rows:
    """Components of some users at one module, ordered by user, their gains not yet relative to anything."""

    user: Tensor  # (m,) int64
    gain: Tensor  # (m,) float64
    left: Side
    right: Side

    def relative_to(self, norm: Tensor) -> Components:
        """Gains over norms (users,) float32, as they are stored; of a norm of 0 none is left."""
        scale = norm.double()[self.user]
        gain = torch.where(scale > 0, self.gain / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        floats = any(
            bool((width >= min(FLOATS)).any())
            for side in (self.left, self.right)
            for width in (side.coords_width, side.own_width)
        )
        kept = gain.float() if floats else gain.half().float()  # as `codec.modes.gain_width` has it
        return Components(self.user, kept, self.left, self.right)


def inside(cores: Tensor, user: Tensor, *, features: tuple[int, int], bits: int) -> Rows:
    """Cores (b, k_out, k_in) of the users named (b,), one component a row or column, whichever are fewer.

    Component j is basis vector j on one side and coordinates on the other; coordinates are at most 1 in size.
    With 32 bits they are the core's numbers, bit for bit, but for an even power of two.
    """
    (o, i), (_, k_out, k_in) = features, cores.shape
    by_row = k_out <= k_in
    lines = (cores if by_row else cores.mT).flatten(0, 1).double()
    count = min(k_out, k_in)
    largest = lines.abs().amax(1)
    scale = power_of_4(largest) if bits == EXACT else largest
    scaled = lines / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    kept = quantise_coords(scaled, bits)
    gain = scale if bits in FLOATS else scale * scale_of(scaled, kept.double())
    axis = torch.arange(count).repeat(len(cores))
    width = torch.full((len(lines),), bits, dtype=torch.uint8)
    told = Side.of_coordinates(kept, width, features=i if by_row else o)
    on_axes = Side.of_axes(axis, features=o if by_row else i, k=k_out if by_row else k_in)
    sides = (on_axes, told) if by_row else (told, on_axes)
    return Rows(user.repeat_interleave(count), gain, *sides)


def beside(own: LoraPair, user: int, *, ranks: tuple[int, int], bits: int) -> Rows:
    """A user's own ranks at a module: sides of unit length without coordinates."""
    left, right = own.B.mT.double(), own.A.double()
    if bits not in FLOATS:  # directions that nearly cancel would leave nothing but what rounding adds
        left, right = _apart(left, right)
    rows = [quantise(unit(side), bits) for side in (left, right)]
    gain = scale_of(left, unit(rows[0].double())) * scale_of(right, unit(rows[1].double()))
    sides = (
        replace(Side.of_own(one, bits), coords=torch.zeros(0, k)) for one, k in zip(rows, ranks, strict=True)
    )
    return Rows(torch.full((len(gain),), user), gain, *sides)


def in_order(parts: list[Rows]) -> Rows:
    """Rows of several kinds user by user, those of one user in the order of the kinds."""
    zero = [Components(part.user, torch.zeros(len(part.user)), part.left, part.right) for part in parts]
    order = torch.argsort(torch.cat([part.user for part in parts]), stable=True)
    whole = concatenate(zero).select(order)
    return Rows(whole.user, torch.cat([part.gain for part in parts])[order], whole.left, whole.right)


def cores_of(part: Components, norm: Tensor, *, ranks: tuple[int, int], users: int) -> Tensor:
    """The cores (users, k_out, k_in) float64 that a reader makes of components without own numbers."""
    left, right = part.left.coordinates(ranks[0]).double(), part.right.coordinates(ranks[1])
    left *= (part.gain.double() * norm.double()[part.user])[:, None]
    return spread(left, part.user, users=users).mT @ spread(right, part.user, users=users)


def power_of_4(sizes: Tensor) -> Tensor:
    """The power of 4 next above each size, 0 for 0."""
    exponent = torch.frexp(sizes).exponent
    return torch.where(sizes > 0, torch.ldexp(torch.ones_like(sizes), exponent + exponent % 2), 0.0)


def _apart(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum of products, left (r, o) and right (r, i), in directions at right angles."""
    q_out, out = torch.linalg.qr(left.mT)
    q_in, inn = torch.linalg.qr(right.mT)
    u, s, vt = torch.linalg.svd(out @ inn.mT)
    return s[:, None] * (q_out @ u).mT, vt @ q_in.mT
