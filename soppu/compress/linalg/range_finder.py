"""The joint method in a few passes over a fleet, everything else on cores.

The basis is sought in K directions of either side, found by a sketch and grown as block Krylov spaces of the
alternation itself, until a further pass promises too little. For the bounds see `bounds`.
`grow` and `certify` are searches in the sense of `sketch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from soppu.compress.linalg import bounds
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.cores import Cores
from soppu.compress.linalg.sketch import CorePass, GramPass, GrowthPass, RangePass, Ranges, Steps
from soppu.compress.linalg.tucker import CoreFit

GROWTH_SPARE = 8  # directions that a sketch or a growth takes beyond k
_COARSE = 6  # times the tolerance will do for a basis in a sample: all users improve it


@dataclass(frozen=True)
class Sizes:
    """Of the deltas of one module: (n, o, i), and q the most columns one has."""

    n: int
    o: int
    i: int
    q: int


@dataclass(frozen=True)
class Search:
    """How far to go.

    The ranges grow by k + 8 directions and two passes a time, and each growth is followed by one alternation.
    """

    every: int = 1  # the first ranges are sought in every n-th batch only; 1 = in all of them
    width: int = 0  # directions of the sketch, at least k are taken; 0 = k + 8, as many as a growth adds
    most_width: int = 512  # directions after which nothing grows any more
    growths: int = 8  # most times the ranges grow
    max_steps: int = 10  # most alternations after the last growth
    # Share of the deltas' energy that the next growth has to promise, judged by the decay of the last two
    # gains, and that two alternations in a row have to gain.
    tolerance: float = 3e-4
    seed: int = 0  # of the sketch


@dataclass(frozen=True, eq=False)
class Grown:
    """Cores in ranges that have grown, the basis found in them, and how many passes that took."""

    cores: Cores
    found: CoreFit
    passes: float

    def cpu(self) -> Grown:
        """The same in the CPU's memory."""
        found = CoreFit(self.found.U.cpu(), self.found.V.cpu(), self.found.objective)
        return Grown(self.cores.cpu(), found, self.passes)

    def narrowed(self, width: int) -> Grown:
        """In `width` directions of either side: the basis found, and what the basis of that rank adds to it.

        They hold nearly all that smaller bases, or several of them, can.
        """
        wide = self.cores.fit(width, max_steps=2, least=0.0)
        pairs = ((self.found.U, wide.U), (self.found.V, wide.V))
        out, inn = (torch.linalg.qr(torch.cat(pair, 1)).Q[:, :width] for pair in pairs)
        found = CoreFit(out.mT @ self.found.U, inn.mT @ self.found.V, self.found.objective)
        return Grown(self.cores.turned(out, inn), found, self.passes)


def grow(sizes: Sizes, rank: int, search: Search) -> Steps[Grown]:
    """Sketch, cores, then growth for as long as it promises more than the tolerance.

    With a sample the same is done in it first. What a few users share stands out more among few, so its basis
    is nearer to the best one than any sketch, for a fraction of the work. All users are then seen in its
    leading directions, `GROWTH_SPARE` more than the sketch has. Of `rank`, min(rank, o, i, columns of all
    deltas) is used.
    """
    k = min(rank, sizes.o, sizes.i)
    width = min(max(search.width, k) if search.width else k + GROWTH_SPARE, sizes.o, sizes.i)
    spent = 0.0
    if search.every > 1:
        coarse = replace(search, tolerance=_COARSE * search.tolerance)
        sample = yield from _sketched(sizes, k, width, coarse)
        near, spent = sample.cores, sample.passes / search.every
        search = replace(search, every=1)
        most = min(near.left.shape[2], near.right.shape[2])
        if most >= width:
            wide = near.fit(min(width + GROWTH_SPARE, most), max_steps=1, least=0.0)
            ranges = Ranges(near.basis_out @ wide.U, near.basis_in @ wide.V)
            grown = yield from _grown(CorePass(ranges, (sizes.n, sizes.q)), k, search)
            return replace(grown, passes=grown.passes + spent)
    grown = yield from _sketched(sizes, k, width, search)  # also where the sample had too few columns
    return replace(grown, passes=grown.passes + spent)


def _sketched(sizes: Sizes, k: int, width: int, search: Search) -> Steps[Grown]:
    """Grow ranges that begin with a sketch."""
    sketch = RangePass(sizes.o, sizes.i, width=width, seed=search.seed)
    yield sketch, search.every
    grown = yield from _grown(CorePass(sketch.finish(), sketch.size), k, search)
    return replace(grown, passes=grown.passes + 1)


def _grown(first: CorePass, k: int, search: Search) -> Steps[Grown]:
    """Grow the ranges that `first` sees the deltas in."""
    yield first, search.every
    cores, gain, passes = first.finish(), math.inf, 1
    k, least = min(k, max(cores.columns, 1)), search.tolerance * cores.total
    found = cores.fit(k, max_steps=1, least=least)
    for _ in range(search.growths):
        if max(cores.basis_out.shape[1], cores.basis_in.shape[1]) + k + GROWTH_SPARE > search.most_width:
            break
        grower = GrowthPass(cores, cores.directions(found, k + GROWTH_SPARE))
        yield grower, search.every
        passes += 1
        more = grower.finish()
        if not more.out.shape[1] and not more.inn.shape[1]:
            break
        further = CorePass(more, first.size)
        yield further, search.every
        passes += 1
        cores = cores.grown(further.finish())
        before, captured = gain, found.objective[-1]
        found = _further(cores, found, 1, least)
        gain = found.objective[-1] - captured
        # Before there are two gains to compare, no decay is assumed.
        decay = gain / before if gain < before < math.inf else 1.0
        if gain * decay < least:
            break
    if search.max_steps and gain >= least:
        found = _further(cores, found, search.max_steps, least)
    return Grown(cores, found, passes)


def _further(cores: Cores, found: CoreFit, max_steps: int, least: float) -> CoreFit:
    more = cores.fit(found.U.shape[1], max_steps=max_steps, least=least, start=found)
    return CoreFit(more.U, more.V, found.objective + more.objective[1:])


def certify(cores: Cores, found: CoreFit, effort: bounds.Effort | None) -> Steps[Certificate]:
    """What the basis found leaves of the unit-norm deltas, and what any other would have to leave.

    The upper bound is that of the truncated HOSVD in the ranges, or `achieved` where that is larger: the best
    basis of rank k leaves no larger error. Only the side with the larger Ritz tail is worth a lower bound:
    the error is at least as large as the larger tail.
    """
    (values_out, vectors_out), (values_in, vectors_in) = cores.ritz()
    k, total, eps = found.U.shape[1], cores.total, torch.finfo(cores.left.dtype).eps
    tails = tuple(total - float(v[:k].clamp(min=0).sum()) for v in (values_out, values_in))
    out = tails[0] >= tails[1]
    basis = cores.basis_out @ vectors_out if out else cores.basis_in @ vectors_in
    if effort is not None and min(len(basis), cores.columns) <= effort.exact_side:
        gram = GramPass(len(basis), cores.columns, out=out)
        yield gram, 1
        top = bounds.exact_top_sum(gram.finish(), k, trace=total, eps=eps)
    else:
        spent = effort or bounds.Effort(probes=0, powers=1)
        near = basis[:, : k + 2 * GROWTH_SPARE]
        top = yield from bounds.sharper_top_sum(near, k, out=out, trace=total, eps=eps, effort=spent)
    achieved = max(total - found.objective[-1], 0.0)
    return Certificate(
        lower_bound=min(max(total - top.value, 0.0), achieved),
        achieved=achieved,
        upper_bound=max(sum(tails), achieved),
        total=total,
        confidence=top.confidence,
    )
