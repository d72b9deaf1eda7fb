"""Scalar quantisers: vectors become small integers whose scale a least-squares gain takes up. Not the code.

A width names a quantiser by the bits a fixed-length code of its levels would take; what a number really costs
is its entropy (`codec.streams`). The step is a multiple of a vector's root mean square, near the one
that gives the least distortion at its entropy for Gaussian numbers: 0.26 bits above the rate-distortion
bound at every width (entropy-constrained uniform quantisation: Gish & Pierce, IEEE Trans. Inform. Theory
14(5), 1968). Widths 16 and 32 keep floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantiser:
    """One uniform quantiser."""

    limit: int  # largest integer in size
    step: float  # step size as a multiple of the vector's root mean square
    distortion: float  # squared error a unit-variance Gaussian number keeps
    rate: float  # its entropy in bits


# Distortion and rate: Gaussian numbers, with the best gain; a fit measures its own before it relies on them.
QUANTISERS: Mapping[int, Quantiser] = MappingProxyType(
    {
        2: Quantiser(2, 1.70, 0.195, 1.437),
        3: Quantiser(7, 0.95, 0.0700, 2.175),
        4: Quantiser(127, 0.45, 0.0166, 3.213),
        5: Quantiser(127, 0.225, 0.00420, 4.206),
        6: Quantiser(127, 0.1125, 0.00105, 5.204),
        8: Quantiser(127, 0.033, 9.1e-5, 6.97),
    }
)
TERNARY = 1  # -1, 0, 1, mostly zeros: made by `soppu.compress.numbers.ternary`, not by `quantise`
FLOATS: Mapping[int, torch.dtype] = MappingProxyType({16: torch.float16, 32: torch.float32})

# Coordinates in a basis are spread unevenly: uniform steps over [-1, 1], and the entropy code makes zeros
# cheap.
COORDS: Mapping[int, int] = MappingProxyType({4: 7, 6: 31, 8: 127})
AXIS = 1  # the coordinates of component j are the unit vector e_j, and take no bits


def quantise(x: Tensor, width: int) -> Tensor:
    """Rows of `x` (m, d) -> integers (m, d), as float32; floats of the width where it is 16 or 32. O(m d).

    The integers stand for x up to one factor a row. From width 4 on the step grows where the largest entry
    of a row asks for it, so nothing is cut off; below, what is beyond the limit is clipped.
    """
    if width in FLOATS:
        return x.to(FLOATS[width]).float()
    made = QUANTISERS[width]
    step = made.step * x.square().mean(1, keepdim=True).sqrt()
    if width > 3:
        step = torch.maximum(step, x.abs().amax(1, keepdim=True) / made.limit)
    levels = (x / step.clamp(min=torch.finfo(x.dtype).tiny)).round()
    return levels.clamp(-made.limit, made.limit).float()


def quantise_coords(x: Tensor, width: int) -> Tensor:
    """Coordinates (m, k) in [-1, 1] -> multiples of 1 / limit, or floats of the width. O(m k)."""
    if width in FLOATS:
        return x.to(FLOATS[width]).float()
    limit = COORDS[width]
    return ((x * limit).round().clamp(-limit, limit) / limit).float()


def scale_of(x: Tensor, q: Tensor) -> Tensor:
    """The factor (m,) that brings rows of `q` nearest to rows of `x`: <x, q> / <q, q>, 0 where q is zero."""
    square = q.square().sum(1)
    return torch.where(square > 0, (x * q).sum(1) / square.clamp(min=torch.finfo(q.dtype).tiny), 0.0)
