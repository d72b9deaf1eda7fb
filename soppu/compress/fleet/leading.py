"""The leading directions of every module of a fleet: what most of the energy of either side lies in.

Two passes find K of them, a sketch and one power pass, or all there are. For the bases of the joint methods,
which are sought where both sides count at once, see `linalg.range_finder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.bounds import Image, TopSum, top_sum
from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.sketch import Power, PowerPass, RangePass, Ranges, rows, weights

FEW_COLUMNS = 256  # so many columns of all deltas together are all kept, and what follows is exact
_PROBES = 16
EXACT_SIDE = 1024  # up to so many features a side's Gram matrix is summed up
EXACT_NUMBERS = 1 << 25  # of all Gram matrices together, 256 MiB


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading directions of one module.

    Attributes:
        power: the directions and what a bound needs to know.
        spectra: all eigenvalues of C_out and of C_in, ascending; None for a side of many features.
    """

    power: Power
    spectra: tuple[Tensor | None, Tensor | None]

    @property
    def ranges(self) -> Ranges:
        """The directions, ordered by energy."""
        return self.power.ranges


def find_ranges(passes: Passes, *, width: int, seed: int, progress: Progress) -> dict[str, Leading]:
    """The leading directions of every module: a sketch and one power pass, two passes over the adapters.

    At least `width` of them, or all there are; where all deltas together span few, all are taken and what
    follows is exact. Where a side has few features its Gram matrix is summed up too, and bounds are exact.
    """
    fleet = passes.fleet
    sketches = {
        name: RangePass(
            o, i, width=_width(width, int(ranks.sum()), min(o, i)), seed=seed, device=fleet.device
        )
        for (name, (o, i)), ranks in zip(fleet.shapes.items(), fleet.ranks, strict=True)
    }
    for name, factors in passes.each(progress, note="sketch"):
        sketches[name].add(factors)
    powers = {name: PowerPass(one.finish(), probes=_PROBES, seed=seed + 1) for name, one in sketches.items()}
    grams = {name: [_gram(size, fleet) for size in shape] for name, shape in fleet.shapes.items()}
    for name, factors in passes.each(progress, note="basis"):
        powers[name].add(factors)
        for gram, vectors in zip(grams[name], (factors.X, factors.Y), strict=True):
            if gram is not None:
                columns = rows(vectors * weights(factors.s)[:, None, :].to(vectors)).double()
                gram += columns.mT @ columns
    return {
        name: Leading(one.finish(), (_spectrum(grams[name][0]), _spectrum(grams[name][1])))
        for name, one in powers.items()
    }


def _gram(features: int, fleet: Fleet) -> Tensor | None:
    sides = sum(size**2 for shape in fleet.shapes.values() for size in shape if size <= EXACT_SIDE)
    if features > EXACT_SIDE or sides > EXACT_NUMBERS:
        return None
    return torch.zeros((features, features), dtype=torch.float64, device=fleet.device)


def _spectrum(gram: Tensor | None) -> Tensor | None:
    return None if gram is None else torch.linalg.eigvalsh(gram).clamp(min=0).cpu()


def _width(asked: int, columns: int, features: int) -> int:
    return min(columns if columns <= FEW_COLUMNS else asked, max(columns, 1), features)


def _certify(
    found: Leading, ranks: tuple[int, int], *, left: Tensor, right: Tensor, captured: float
) -> Certificate:
    """What bases of these ranks leave of unit-norm deltas, and what any others would have to leave.

    Args:
        ranks: of the output and the input side.
        left: (K,) energy along every direction of the output side.
        right: (K',) of the input side.
        captured: energy inside both bases.
    """
    total = found.power.total
    images = (found.power.image_out, found.power.image_in)
    sums = [
        _top_sum(image, spectrum, k, total)
        for image, spectrum, k in zip(images, found.spectra, ranks, strict=True)
        if k
    ]
    lower = total if 0 in ranks else max([total - one.value for one in sums] + [0.0])
    tails = [total - float(side[:k].sum()) for side, k in zip((left, right), ranks, strict=True)]
    achieved = max(total - captured, lower)
    return Certificate(
        lower_bound=lower,
        achieved=achieved,
        upper_bound=max(min(sum(tails), 2 * total), achieved),
        total=total,
        confidence=min([one.confidence for one in sums], default=1.0),
    )


def on_cpu(ranges: Ranges) -> Ranges:
    """The same in the CPU's memory; no copy where it is there."""
    return Ranges(ranges.out.cpu(), ranges.inn.cpu())


def _cores(factors: Canonical, ranges: Ranges) -> tuple[Tensor, Tensor]:
    norm = factors.s.norm(dim=1).clamp(min=torch.finfo(factors.s.dtype).tiny)
    left = ranges.out.mT.to(factors.X) @ factors.X * (factors.s / norm[:, None])[:, None, :]
    return left, factors.Y.mT @ ranges.inn.to(factors.Y)


def _top_sum(image: Image, spectrum: Tensor | None, k: int, total: float) -> TopSum:
    eps = torch.finfo(torch.float32).eps
    if spectrum is None:
        return top_sum(image, k, trace=total, eps=eps)
    return TopSum(min(float(spectrum[-k:].sum()) * (1 + 8 * eps), total), 1.0)


def certify_leading(
    passes: Passes,
    powers: Mapping[str, Leading],
    ranks: Mapping[str, tuple[int, int]],
    *,
    progress: Progress,
) -> dict[str, Certificate]:
    """Certificates of the leading `ranks` directions of every module: one pass over the adapters."""
    sums = {
        name: [
            torch.zeros(side.shape[1], dtype=torch.float64) for side in (power.ranges.out, power.ranges.inn)
        ]
        for name, power in powers.items()
    }
    captured = dict.fromkeys(powers, 0.0)
    for name, factors in passes.each(progress, note="certificate"):
        left, right = (side.cpu() for side in _cores(factors, powers[name].ranges))
        s = factors.s.cpu()
        weight = s / s.norm(dim=1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        sums[name][0] += left.double().square().sum((0, 2))
        sums[name][1] += (right * weight[:, :, None]).double().square().sum((0, 1))
        k_out, k_in = ranks[name]
        captured[name] += float((left[:, :k_out] @ right[:, :, :k_in]).double().square().sum())
    return {
        name: _certify(power, ranks[name], left=sums[name][0], right=sums[name][1], captured=captured[name])
        for name, power in powers.items()
    }
