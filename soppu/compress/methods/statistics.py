"""What the default method knows of a fleet before it codes anything: bases, and every component's place in
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from soppu.compress.fleet.leading import find_leading
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.sketch import Power, Ranges
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.methods.plan import COLUMNS, RANKS, ModuleStats
from soppu.compress.numbers.allocate import Costs, measure
from soppu.compress.options import CompressOptions

_SKETCH_SPARE = 24  # columns of a sketch beyond the largest rank
_MEASURED = 8  # users whose vectors say what numbers cost


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the passes before the coding find."""

    passes: Passes
    leading: Mapping[str, Power]  # module -> its leading K directions; empty where no basis is wanted
    modules: list[ModuleStats]  # one entry for every module
    costs: Costs
    progress: Progress

    @property
    def fleet(self) -> Fleet:
        """The fleet they are of."""
        return self.passes.fleet


def gather(passes: Passes, options: CompressOptions, *, progress: Progress) -> Statistics:
    """Find the leading directions, then the statistics: three passes over the adapters, one without bases."""
    fleet, leading = passes.fleet, dict[str, Power]()
    if options.method != "svd":
        width = options.rank + _SKETCH_SPARE
        leading = find_leading(passes, width=width, seed=options.seed, progress=progress)
    allowed = tuple(k for k in RANKS if k <= options.rank)
    ranges = {name: side.ranges.cpu() for name, side in leading.items()}
    table: dict[str, list[ModuleStats]] = {name: [] for name in fleet.shapes}
    vectors: list[Tensor] = []
    for batch in fleet.batches():
        for name in fleet.shapes:
            factors = passes.form(batch, name).cpu()
            norm = fleet.norm[batch.first : batch.first + batch.size]
            stats = _stats(factors, norm, allowed, ranges.get(name), passes.whiteners.get(name))
            table[name].append(replace(stats, user=stats.user + batch.first))
            if batch.first == 0:
                vectors += _leading(factors)
        progress("statistics", batch.first + batch.size, len(fleet.users))
    modules = []
    for parts in table.values():
        columns: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in COLUMNS}
        modules.append(replace(parts[0], **columns))
    return Statistics(passes, leading, modules, measure(vectors), progress)


def _stats(
    factors: Canonical,
    norm: Tensor,
    allowed: tuple[int, ...],
    ranges: Ranges | None,
    whitener: Whitener | None,
) -> ModuleStats:
    """The components of one batch at one module; those of zero energy are left out."""
    users, r = factors.s.shape
    user = torch.arange(users).repeat_interleave(r)
    total = norm[user].square().clamp(min=torch.finfo(torch.float32).tiny)
    energy = (factors.s.double().reshape(-1).square() / total).float()
    left, right = factors.X.mT.flatten(0, 1), factors.Y.mT.flatten(0, 1)
    ranks = (0,) if ranges is None else tuple(k for k in allowed if k <= ranges.out.shape[1])
    weight = torch.ones(len(user)) if whitener is None else whitener.back(right).square().sum(1).float()
    keep = energy > 0
    return ModuleStats(
        out=left.shape[1],
        inn=right.shape[1],
        user=user[keep],
        energy=energy[keep],
        missed_out=_missed(left[keep], None if ranges is None else ranges.out, ranks),
        missed_in=_missed(right[keep], None if ranges is None else ranges.inn, ranks),
        weight_in=weight[keep],
        ranks=ranks,
    )


def _missed(rows: Tensor, basis: Tensor | None, ranks: tuple[int, ...]) -> Tensor:
    """(m, len(ranks)) share of unit rows outside the first ranks[j] columns; half precision is enough of a
    share.
    """
    if basis is None:
        return torch.ones((len(rows), 1), dtype=torch.float16)
    inside = (rows @ basis.to(rows.dtype)).square().cumsum(1)
    picked = torch.stack([inside[:, k - 1] if k else torch.zeros(len(rows)) for k in ranks], 1)
    return (1 - picked).clamp(min=1e-6).half()


def _leading(factors: Canonical) -> list[Tensor]:
    """The strongest half of the first users' components, on either side: what most numbers will be spent
    on.
    """
    half = -(-factors.s.shape[1] // 2)
    return [side[:_MEASURED, :, :half].mT.reshape(-1, side.shape[1]) for side in (factors.X, factors.Y)]
