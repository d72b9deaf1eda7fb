"""What the default method knows of a fleet before it codes anything: bases, and every component's place in
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soppu.compress.fleet.leading import find_leading
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.sketch import Power, Ranges
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.methods.plan import RANKS, ModuleStats, Setting
from soppu.compress.numbers import costs

if TYPE_CHECKING:
    from soppu.compress.methods.fit import Question

_SKETCH_SPARE = 24  # columns of a sketch beyond the largest rank
_MEASURED = 8  # users whose vectors say what numbers cost


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the passes before the coding find.

    Attributes:
        leading: module -> the leading K directions of either side; empty where no basis is wanted.
        modules: one entry for every module.
    """

    passes: Passes
    leading: Mapping[str, Power]
    modules: list[ModuleStats]
    setting: Setting

    @property
    def fleet(self) -> Fleet:
        """The fleet they are of."""
        return self.passes.fleet


def gather(passes: Passes, question: Question, *, progress: Progress) -> Statistics:
    """Find the leading directions, then the statistics: three passes over the adapters, one without bases."""
    fleet, leading = passes.fleet, dict[str, Power]()
    if question.most_rank:
        width = question.most_rank + _SKETCH_SPARE
        leading = find_leading(passes, width=width, seed=question.seed, progress=progress)
    ranges = {name: side.ranges.cpu() for name, side in leading.items()}
    table: dict[str, list[ModuleStats]] = {name: [] for name in fleet.shapes}
    vectors: list[Tensor] = []
    for batch in fleet.batches():
        for name in fleet.shapes:
            factors = passes.form(batch, name).cpu()
            whitener = passes.whiteners.get(name)
            table[name].append(_stats(factors, batch.first, fleet.norm, ranges.get(name), whitener))
            if batch.first == 0:
                vectors += _leading(factors)
        progress("statistics", batch.first + batch.size, len(fleet.users))
    setting = Setting(costs.measure(vectors), question.widths, question.most_rank)
    modules = [_joined(parts) for parts in table.values()]
    return Statistics(passes, leading, modules, setting)


def _stats(
    factors: Canonical, first: int, norm: Tensor, ranges: Ranges | None, whitener: Whitener | None
) -> ModuleStats:
    """The components of one batch at one module; those of zero energy are left out."""
    users, r = factors.s.shape
    user = torch.arange(first, first + users).repeat_interleave(r)
    total = norm[user].square().clamp(min=torch.finfo(torch.float32).tiny)
    energy = (factors.s.double().reshape(-1).square() / total).float()
    left, right = factors.X.mT.reshape(-1, factors.X.shape[1]), factors.Y.mT.reshape(-1, factors.Y.shape[1])
    ranks = tuple(k for k in RANKS if ranges is None or k <= ranges.out.shape[1])
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
        ranks=ranks if ranges is not None else (0,),
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


def _joined(parts: list[ModuleStats]) -> ModuleStats:
    return replace(
        parts[0],
        user=torch.cat([part.user for part in parts]),
        energy=torch.cat([part.energy for part in parts]),
        missed_out=torch.cat([part.missed_out for part in parts]),
        missed_in=torch.cat([part.missed_in for part in parts]),
        weight_in=torch.cat([part.weight_in for part in parts]),
    )
