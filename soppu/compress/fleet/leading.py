"""The leading directions of every module of a fleet: what most of the energy of either side lies in.

Two passes find K of them, a sketch and one power pass, or all there are. For the bases of the joint methods,
which are sought where both sides count at once, see `linalg.range_finder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.linalg.bounds import TopSum, top_sum
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.sketch import Image, Power, PowerPass, RangePass

FEW_COLUMNS = 256  # so many columns of all deltas together are all kept, and what follows is exact
_PROBES = 16
EXACT_SIDE = 1024  # up to so many features a side's Gram matrix is summed up
EXACT_NUMBERS = 1 << 25  # of all Gram matrices together, 256 MiB


def find_leading(passes: Passes, *, width: int, seed: int, progress: Progress) -> dict[str, Power]:
    """The leading directions of every module: a sketch and one power pass, two passes over the adapters.

    At least `width` of them, or all there are; where all deltas together span few, all are taken and what
    follows is exact. Where a side has few features its Gram matrix is summed up too, and bounds are exact.
    """
    fleet = passes.fleet
    sketches = {}
    for (name, shape), ranks in zip(fleet.shapes.items(), fleet.ranks, strict=True):
        columns = int(ranks.sum())
        asked = min(columns if columns <= FEW_COLUMNS else width, max(columns, 1), *shape)
        sketches[name] = RangePass(*shape, width=asked, seed=seed, device=fleet.device)
    for name, factors in passes.each(progress, note="sketch"):
        sketches[name].add(factors)
    sides = sum(size**2 for shape in fleet.shapes.values() for size in shape if size <= EXACT_SIDE)
    most = EXACT_SIDE if sides <= EXACT_NUMBERS else 0
    powers = {}
    for name, (o, i) in fleet.shapes.items():
        ranges = sketches.pop(name).finish()
        powers[name] = PowerPass(ranges, probes=_PROBES, seed=seed + 1, exact=(o <= most, i <= most))
    for name, factors in passes.each(progress, note="basis"):
        powers[name].add(factors)
    return {name: power.finish() for name, power in powers.items()}


def certify_leading(
    passes: Passes,
    powers: Mapping[str, Power],
    ranks: Mapping[str, tuple[int, int]],
    *,
    progress: Progress,
) -> dict[str, Certificate]:
    """Certificates of the leading directions, `ranks` of either side: one pass over the adapters."""
    sums = {
        name: [torch.zeros(image.basis.shape[1], dtype=torch.float64) for image in power.images]
        for name, power in powers.items()
    }
    captured = dict.fromkeys(powers, 0.0)
    for name, factors in passes.each(progress, note="certificate"):
        ranges, s = powers[name].ranges, factors.s
        weight = s / s.norm(dim=1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        left = (ranges.out.mT.to(factors.X) @ factors.X * weight[:, None, :]).cpu()
        right = (factors.Y.mT @ ranges.inn.to(factors.Y)).cpu()
        sums[name][0] += left.double().square().sum((0, 2))
        sums[name][1] += (right * weight.cpu()[:, :, None]).double().square().sum((0, 1))
        k_out, k_in = ranks[name]
        captured[name] += float((left[:, :k_out] @ right[:, :, :k_in]).double().square().sum())
    return {name: _certify(power, ranks[name], sums[name], captured[name]) for name, power in powers.items()}


def _certify(
    power: Power, ranks: tuple[int, int], energies: Sequence[Tensor], captured: float
) -> Certificate:
    """What bases of these ranks leave of unit-norm deltas, and what any others would have to leave.

    `energies` (K,) and (K',) are those along the directions of either side, `captured` is that in both bases.
    """
    total = power.total
    sides = zip(power.images, power.spectra, ranks, strict=True)
    tops = [_top_sum(image, spectrum, k, total) for image, spectrum, k in sides if k]
    lower = total if 0 in ranks else max([total - top.value for top in tops] + [0.0])
    tails = [total - float(side[:k].sum()) for side, k in zip(energies, ranks, strict=True)]
    achieved = max(total - captured, lower)
    return Certificate(
        lower_bound=lower,
        achieved=achieved,
        upper_bound=max(min(sum(tails), 2 * total), achieved),
        total=total,
        confidence=min([top.confidence for top in tops], default=1.0),
    )


def _top_sum(image: Image, spectrum: Tensor | None, k: int, total: float) -> TopSum:
    eps = torch.finfo(torch.float32).eps
    if spectrum is None:
        return top_sum(image, k, trace=total, eps=eps)
    return TopSum(min(float(spectrum[-k:].sum()) * (1 + 8 * eps), total), 1.0)
