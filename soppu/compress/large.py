"""The joint method for fleets too many for `joint.fit`: a few passes over them, and everything else on cores.

`joint.fit` solves eigenproblems of the side of the features or of all columns. Here the basis is sought in K
directions of either side, found by a sketch and grown as block Krylov spaces of the alternation itself, until
a further pass promises too little. What they miss of every user is known; for the bounds see `bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress import bounds
from soppu.compress.canonical import canonical
from soppu.compress.cores import Cores, Found
from soppu.compress.joint import JointFit, fix_signs
from soppu.compress.sketch import AT_A_TIME, CorePass, Deltas, GrowthPass, RangePass, rows, weights

SPARE = 8  # directions of a step beyond k
# Share of the tolerance that the next growth has to promise, judged by the decay of the last two gains.
_NEGLIGIBLE = 0.1

Batches = Callable[[], Iterable[Deltas]]


@dataclass(frozen=True, eq=False)
class LargeFit(JointFit):
    """A JointFit whose basis was sought in K directions of either side.

    `objective` holds the steps before the ranges had grown too. `upper_bound` is that of the truncated HOSVD
    in the ranges, or `achieved` where that is larger: the best basis of rank k leaves no larger error.

    Attributes:
        confidence: probability with which `lower_bound` holds, at least; 1 where nothing random is behind it.
        outside: (n,) energy of the unit-norm deltas outside the ranges.
        width: (K, K') directions of the output and of the input side.
        passes: over the deltas, without those of the bound.
    """

    confidence: float
    outside: Tensor
    width: tuple[int, int]
    passes: int


@dataclass(frozen=True)
class Search:
    """How far to go.

    Attributes:
        width: directions of the sketch, at least k are taken; 0 = k + 8, as many as a growth adds.
        growths: most times the ranges grow, by k + 8 directions and two passes a time.
        max_steps: most alternations after the last growth; each growth is followed by one.
        tolerance: share of the deltas' energy that is not worth a growth, nor two steps in a row.
        bound: what a bound may cost; None = the one that a single pass gives for certain.
        seed: of the sketch.
    """

    width: int = 0
    growths: int = 8
    max_steps: int = 10
    tolerance: float = 1e-4
    bound: bounds.Effort | None = bounds.Effort(probes=16, powers=2)
    seed: int = 0


def fit_large(outs: Tensor, ins: Tensor, *, rank: int, search: Search | None = None) -> LargeFit:
    """Fit one shared basis to n low-rank deltas D_n = outs[n] @ ins[n] that are in memory.

    O(n r (o + i) (K + r)) in all, K the directions in the end, and as much memory as the deltas once more.

    Args:
        outs: (n, o, r) of any float type, the LoRA scale in them. Narrow adapters have zero columns.
        ins: (n, r, i).
        rank: k asked for; min(k, o, i, columns of all deltas) is used.
        search: how far to go.

    Raises:
        AdapterError: shapes that do not belong together, or a norm that is not finite in float32.
    """
    deltas = canonical(outs, ins)
    shape = (outs.shape[1], ins.shape[2])
    return fit_batches(lambda: (deltas,), shape, rank=rank, search=search)


def fit_batches(
    batches: Batches, shape: tuple[int, int], *, rank: int, search: Search | None = None
) -> LargeFit:
    """Fit one shared basis to deltas that come a batch of users at a time, in memory O(n r K + (o + i) K).

    Args:
        batches: gives all users anew each time it is called, in the same order: one call is one pass.
        shape: (o, i).
        rank: k asked for; min(k, o, i, columns of all deltas) is used.
        search: how far to go.
    """
    search = search or Search()
    cores, found, passes = _search(batches, shape, rank, search)
    k = found.u.shape[1]
    tails, top = _tails(batches, cores, k, effort=search.bound)
    u, v = fix_signs(cores.basis_out @ found.u), fix_signs(cores.basis_in @ found.v)
    turned_u, turned_v = cores.basis_out.mT @ u, cores.basis_in.mT @ v
    achieved = max(cores.total - found.objective[-1], 0.0)
    return LargeFit(
        U=u,
        V=v,
        left=(cores.out.double() @ turned_u).mT,
        right=cores.weight[:, :, None] * (cores.inn.double() @ turned_v),
        norm=cores.norm,
        objective=found.objective,
        total=cores.total,
        lower_bound=min(max(cores.total - top.value, 0.0), achieved),
        upper_bound=max(sum(tails), achieved),
        confidence=top.confidence,
        outside=cores.outside(),
        width=(cores.basis_out.shape[1], cores.basis_in.shape[1]),
        passes=passes,
    )


def _search(batches: Batches, shape: tuple[int, int], rank: int, search: Search) -> tuple[Cores, Found, int]:
    """Sketch, cores, then growth for as long as it promises more than the tolerance."""
    k = min(rank, *shape)
    width = max(search.width, k) if search.width else k + SPARE
    sketch = RangePass(*shape, width=width, seed=search.seed)
    for batch in batches():
        sketch.add(batch)
    cores = _cores(CorePass(sketch.finish(), sketch.size), batches)
    k, least = min(k, max(cores.columns, 1)), search.tolerance * cores.total
    found = cores.fit(k, max_steps=1, least=least)
    gain, passes = math.inf, 2
    for _ in range(search.growths):
        grower = GrowthPass(cores, cores.directions(found, k + SPARE))
        for batch in batches():
            grower.add(batch)
        passes += 1
        more = grower.finish()
        if not more.out.shape[1] and not more.inn.shape[1]:
            break
        cores = cores.grown(_cores(CorePass(more, sketch.size), batches))
        passes += 1
        before, captured = gain, found.objective[-1]
        found = _further(cores, found, 1, least)
        gain = found.objective[-1] - captured
        # Before there are two gains to compare, no decay is assumed.
        decay = gain / before if gain < before < math.inf else 1.0
        if gain * decay < _NEGLIGIBLE * least:
            break
    if gain >= least:
        found = _further(cores, found, search.max_steps, least)
    return cores, found, passes


def _cores(core_pass: CorePass, batches: Batches) -> Cores:
    for batch in batches():
        core_pass.add(batch)
    return core_pass.finish()


def _further(cores: Cores, found: Found, max_steps: int, least: float) -> Found:
    more = cores.fit(found.u.shape[1], max_steps=max_steps, least=least, start=found)
    return Found(more.u, more.v, found.objective + more.objective[1:])


def _tails(
    batches: Batches, cores: Cores, k: int, *, effort: bounds.Effort | None
) -> tuple[tuple[float, float], bounds.TopSum]:
    """The Ritz tails of either side, and what the side of the larger one can hold at most.

    Only that side is worth a bound: the error is at least as large as the larger tail.
    """
    (values_out, vectors_out), (values_in, vectors_in) = cores.ritz()
    tails = tuple(cores.total - float(v[:k].clamp(min=0).sum()) for v in (values_out, values_in))
    out = tails[0] >= tails[1]
    basis = cores.basis_out @ vectors_out if out else cores.basis_in @ vectors_in

    def weighted() -> Iterable[tuple[Tensor, Tensor]]:
        for batch in batches():
            found = rows(batch.X if out else batch.Y)
            yield found, weights(batch.s).to(found).reshape(-1, 1)

    sides = _Side(weighted, len(basis), cores.columns, cores.total, torch.finfo(cores.out.dtype).eps)
    return (tails[0], tails[1]), sides.top_sum(basis[:, : k + 2 * SPARE], k, effort)


@dataclass(frozen=True)
class _Side:
    """C = sum over the batches of W^T diag(w^2) W on one side; each gives W (m, d) and w (m, 1)."""

    weighted: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    d: int
    columns: int
    total: float
    eps: float

    def top_sum(self, basis: Tensor, k: int, effort: bounds.Effort | None) -> bounds.TopSum:
        if effort is not None and min(self.d, self.columns) <= bounds.EXACT_SIDE:
            return bounds.exact_top_sum(self._gram(), k, trace=self.total, eps=self.eps)
        spent = bounds.Effort(probes=0, powers=1) if effort is None else effort
        return bounds.sharper_top_sum(self._apply, basis, k, trace=self.total, eps=self.eps, effort=spent)

    def _gram(self) -> Tensor:
        """C, or where there are fewer columns than features W W^T, which has the same eigenvalues."""
        if self.columns < self.d:
            used = torch.cat([(found * w)[w[:, 0] > 0] for found, w in self.weighted()])
            return used @ used.mT
        gram: Tensor | None = None
        for found, w in self.weighted():
            part = found.mT @ (w.square() * found)
            gram = part if gram is None else gram.add_(part)
        assert gram is not None
        return gram

    def _apply(self, block: Tensor) -> Tensor:
        made = torch.zeros_like(block.mT)  # products of few rows and many columns are the faster ones
        for whole, weight in self.weighted():
            block = block.to(whole.dtype)
            for found, w in zip(whole.split(AT_A_TIME), weight.split(AT_A_TIME), strict=True):
                made += (w.square() * (found @ block)).mT @ found
        return made.mT
