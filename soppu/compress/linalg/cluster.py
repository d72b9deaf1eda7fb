"""Which users share a basis: a seed-aware start, then every user to the basis with the least error.

Adapters that grew from one random A span nearly the same input space, and one basis serves them nearly for
nothing; a basis fitted to a mixture serves its majority and erases the rest. So users are first grouped by
the spaces they use (Brüel Gabrielsson et al., "Compress then Serve", ICML 2025, appendix A.3, group by
cores alone), features of length 1 lest k-means falls apart into singletons. Then bases are refitted and
users reassigned by their error over all modules until nobody moves; both steps lower the same objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.linalg import tucker
from soppu.compress.linalg.cores import Cores

_STARTS = 4
_FEW, _STARTS_OF_FEW = 64, 16  # few users cost little, and a start more often misses the best of their groups
_MOST_MOVES = 12
_KMEANS = 25
_PROBES = 96  # columns that stand for a module's features in the start
Refit = Callable[[Cores, Tensor], tucker.CoreFit]  # of the members, a mask (n,), at one module


@dataclass(frozen=True, eq=False)
class Clustering:
    """Who is in which cluster, and the bases of each."""

    cluster: Tensor  # (n,) int64
    fits: Mapping[str, tuple[tucker.CoreFit, ...]]  # module -> the joint fit of every cluster, in core space
    errors: tuple[float, ...]  # squared, of unit-norm deltas in all modules, after the start and every round


def fit(
    cores: Mapping[str, Cores], *, clusters: int, rank: int, max_steps: int, tolerance: float, seed: int
) -> Clustering:
    """Cluster n users into at most `clusters` bases, the best of several starts. O(n c K r k) a round.

    Args:
        rank: k of every basis.
        max_steps: most alternations of a joint fit.
        tolerance: share of the energy two quiet steps gain.
        seed: of the starts.
    """

    def refit(module: Cores, members: Tensor) -> tucker.CoreFit:
        left, right = module.left[members].mT, module.right[members]
        energy = tucker.core_energy(left, right)
        stop = tucker.Stop(max_steps, tolerance * energy, ceiling=energy)
        return tucker.fit_cores(left, right, rank=rank, stop=stop)

    users = len(next(iter(cores.values())).left)
    if clusters == 1:
        return _settle(cores, torch.zeros(users, dtype=torch.int64), clusters, refit)
    count = _STARTS_OF_FEW if users <= _FEW else _STARTS
    starts = (start(cores, clusters=clusters, seed=seed + number) for number in range(count))
    return min((_settle(cores, one, clusters, refit) for one in starts), key=lambda fitted: fitted.errors[-1])


def _settle(cores: Mapping[str, Cores], cluster: Tensor, clusters: int, refit: Refit) -> Clustering:
    """Refit and reassign until nobody moves."""
    errors: list[float] = []
    while True:
        fits = {
            name: tuple(refit(module, cluster == c) for c in range(clusters))
            for name, module in cores.items()
        }
        table = torch.stack([_errors(module, fits[name]) for name, module in cores.items()]).sum(0)
        here = table.gather(1, cluster[:, None])[:, 0]
        errors.append(float(here.sum()))
        least, nearest = table.min(1)
        moved = torch.where(least < here - 1e-9, nearest, cluster)
        if bool((moved == cluster).all()) or len(errors) > _MOST_MOVES:
            return Clustering(cluster, fits, tuple(errors))
        cluster = moved


def _errors(module: Cores, fits: tuple[tucker.CoreFit, ...]) -> Tensor:
    """(n, c) squared error of every user in every basis, up to what lies outside core space for all alike."""
    rows = []
    for left, right, _ in module.chunks():
        energy = ((left @ left.mT) * (right @ right.mT)).sum((-2, -1))
        kept = [((one.U.mT @ left.mT) @ (right @ one.V)).square().sum((-2, -1)) for one in fits]
        rows.append(energy[:, None] - torch.stack(kept, 1))
    return torch.cat(rows)


def start(cores: Mapping[str, Cores], *, clusters: int, seed: int) -> Tensor:
    """(n,) a first grouping: k-means++ on features of the spaces every user works in. O(n c f) a round.

    A user's feature is the input side's second moments D_n^T D_n, the same of the output side, and both
    seen by a few probes; its cosine to another's is large where both share an initialisation or an output
    space.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.cat([_features(module, generator) for module in cores.values()], 1)
    features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    centres = _spread(features, min(clusters, len(features)), generator)
    for _ in range(_KMEANS):
        cluster = (features @ centres.mT).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, features)
        empty = sums.norm(dim=1) == 0
        # an emptied cluster starts again at the user who is worst served
        worst = (features @ centres.mT).amax(1).argsort()[: int(empty.sum())]
        sums[empty] = features[worst]
        centres = sums / sums.norm(dim=1, keepdim=True)
    return (features @ centres.mT).argmax(1)


def _features(module: Cores, generator: torch.Generator) -> Tensor:
    parts = []
    for side in (module.right, module.left):
        size = side.shape[2]
        probes = torch.randn(size, min(_PROBES, size), generator=generator) / size**0.5
        seen = (side.mT @ (side @ probes)).flatten(1)
        parts.append(seen / seen.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return torch.cat(parts, 1)


def _spread(features: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ on the sphere (Arthur & Vassilvitskii, SODA 2007): centres far from one another."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    for _ in range(1, min(clusters, len(features))):
        far = (1 - (features @ features[chosen].mT).amax(1)).clamp(min=1e-9)
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
    return features[chosen + chosen[:1] * (clusters - len(chosen))].clone()
