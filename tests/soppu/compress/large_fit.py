"""The whole of a large fit of one module: passes, bounds, and bases in feature space."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from soppu.compress.linalg import bounds, range_finder
from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.cores import Cores
from soppu.compress.linalg.range_finder import Sizes, certify, grow
from soppu.compress.linalg.sketch import Steps, begun
from tests.soppu.compress.dense_joint import JointFit, fix_signs

Batches = Callable[[], Iterable[Canonical]]
_TOGETHER = 64  # users of a batch, where all deltas are in memory
T = TypeVar("T")


@dataclass(frozen=True)
class Search(range_finder.Search):
    """How far to go, and what a bound may cost; None = the one that a single pass gives for certain."""

    bound: bounds.Effort | None = bounds.Effort(probes=16, powers=2)


@dataclass(frozen=True, eq=False)
class LargeFit(JointFit):
    """A JointFit whose basis was sought in K directions of either side.

    `objective` holds the steps before the ranges had grown too; for `upper_bound` see `certify`.

    Attributes:
        confidence: probability with which `lower_bound` holds, at least; 1 where nothing random is behind it.
        outside: (n,) energy of the unit-norm deltas outside the ranges.
        width: (K, K') directions of the output and of the input side.
        passes: over the deltas, without those of the bound; a part of them counts as much as it is.
    """

    confidence: float
    outside: Tensor
    width: tuple[int, int]
    passes: float


def alone(search: Steps[T], batches: Batches) -> T:
    """What one search finds; `batches` gives all users anew at each call, in the same order."""
    found: dict[str, T] = {}
    while under_way := dict(begun({"": search}, found)):
        one, every = under_way[""]
        for number, batch in enumerate(batches()):
            if number % every == 0:
                one.add(batch)
    return found[""]


def outside(cores: Cores) -> Tensor:
    """(n,) energy of every unit-norm delta outside the directions; no basis within them reaches it.

    O(n q^2 (K + K')). Round-off of the coordinates bounds it from below, about 1e-7 for float32.
    """
    inside = [((x @ x.mT) * (y @ y.mT)).sum((1, 2)) for x, y, _ in cores.chunks()]
    return ((cores.norm > 0).double() - torch.cat(inside)).clamp(min=0)


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
    parts = [deltas.of(slice(n, n + _TOGETHER)) for n in range(0, len(outs), _TOGETHER)]
    shape = (outs.shape[1], ins.shape[2])
    return fit_batches(lambda: parts, shape, rank=rank, search=search)


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
    counts = [one.s.shape for one in batches()]
    sizes = Sizes(sum(n for n, _ in counts), *shape, max(q for _, q in counts))
    grown = alone(grow(sizes, rank, search), batches)
    cores, found = grown.cores, grown.found
    certificate = alone(certify(cores, found, search.bound), batches)
    u, v = fix_signs(cores.basis_out @ found.U), fix_signs(cores.basis_in @ found.V)
    return LargeFit(
        U=u,
        V=v,
        left=(cores.left.double() @ (cores.basis_out.mT @ u)).mT,
        right=cores.right.double() @ (cores.basis_in.mT @ v),
        norm=cores.norm,
        objective=found.objective,
        total=cores.total,
        lower_bound=certificate.lower_bound,
        upper_bound=certificate.upper_bound,
        confidence=certificate.confidence,
        outside=outside(cores),
        width=(cores.basis_out.shape[1], cores.basis_in.shape[1]),
        passes=grown.passes,
    )
