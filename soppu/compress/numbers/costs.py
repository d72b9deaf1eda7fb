"""What numbers cost in bits and lose in precision, measured on the vectors at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soppu.compress.numbers.quantise import FLOATS, QUANTISERS, quantise, scale_of

_FLOAT_DISTORTION = {16: 2.0**-24, 32: 2.0**-48}


@dataclass(frozen=True)
class Costs:
    """Width -> bits a number, width -> share of squared error left; Gaussian numbers unless measured.

    Attributes:
        coords: bits spent on coordinates over bits expected of Gaussian ones.
    """

    rate: Mapping[int, float] = field(
        default_factory=lambda: {w: q.rate for w, q in QUANTISERS.items()} | {w: float(w) for w in FLOATS}
    )
    distortion: Mapping[int, float] = field(
        default_factory=lambda: {w: q.distortion for w, q in QUANTISERS.items()} | _FLOAT_DISTORTION
    )
    coords: float = 1.0


def measure(rows: Sequence[Tensor]) -> Costs:
    """Costs of vectors like these: tensors (m, d), zero rows left out. O(widths size)."""
    plain = Costs()
    rate, distortion = dict(plain.rate), dict(plain.distortion)
    used = [part[part.square().sum(1) > 0] for part in rows]
    numbers = sum(part.numel() for part in used)
    if not numbers:
        return plain
    for width in QUANTISERS:
        counts, lost, vectors = torch.zeros(256, dtype=torch.float64), 0.0, 0
        for part in used:
            q = quantise(part, width)
            rest = part - scale_of(part, q)[:, None] * q
            lost += float((rest.square().sum(1) / part.square().sum(1)).sum())
            vectors += len(part)
            counts += torch.bincount((q + 128).long().reshape(-1), minlength=256)
        shares = counts[counts > 0] / numbers
        rate[width] = max(float(-(shares * shares.log2()).sum()) * 1.01, 0.35)
        distortion[width] = lost / max(vectors, 1)
    return Costs(rate, distortion, plain.coords)
