"""The joint methods: every user a core in one shared basis, or in one of several, or a diagonal core.

All fitting is done in core space (`soppu.compress.core_space`), so looking for the largest rank that meets a
target costs one coding pass for each rank tried, and no further pass for the fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.compress import cluster, diagonal
from soppu.compress.basis import Basis
from soppu.compress.cluster import Clustering
from soppu.compress.coder import SideCoder
from soppu.compress.coding import Coding
from soppu.compress.core_coder import CoreCoder
from soppu.compress.core_space import Leading, ModuleCores, certify, collect, find_ranges
from soppu.compress.fit import Bases, Fit, Progress
from soppu.compress.fleet import Fleet
from soppu.compress.joint import CoreFit
from soppu.compress.metrics import Certificate
from soppu.compress.options import CompressOptions
from soppu.compress.plan import RANKS
from soppu.compress.whitening import Whitener
from soppu.errors import BundleError

_SPARE = 32
_MOST_WIDTH = 512  # directions of core space


@dataclass(frozen=True, eq=False)
class _Known:
    fleet: Fleet
    options: CompressOptions
    whiteners: Mapping[str, Whitener]
    powers: Mapping[str, Leading]
    cores: Mapping[str, ModuleCores]
    progress: Progress


def fit(
    fleet: Fleet,
    options: CompressOptions,
    *,
    whiteners: Mapping[str, Whitener],
    size_of: Callable[[Fit], int],
    progress: Progress,
) -> Fit:
    """Compress a fleet by the method its options name. Three passes over the adapters, one more a rank tried.

    Raises:
        BundleError: no rank meets the target.
    """
    width = min(options.clusters * options.rank + options.rank + _SPARE, _MOST_WIDTH)
    powers = find_ranges(fleet, whiteners, width=width, seed=options.seed, progress=progress)
    ranges = {name: power.ranges for name, power in powers.items()}
    cores = collect(fleet, whiteners, ranges, progress=progress)
    known = _Known(fleet, options, whiteners, powers, cores, progress)
    found, grouped = _search(known, size_of) if options.target else _at_rank(known, options.rank)
    certificates = {name: _certificate(known, name, fits) for name, fits in grouped.fits.items()}
    return replace(found, certificates=certificates)


def _search(known: _Known, size_of: Callable[[Fit], int]) -> tuple[Fit, Clustering]:
    """The largest rank within the bytes allowed, or the smallest within the error, by bisection."""
    target = known.options.target
    allowed = target.most_bytes(known.fleet.parameters)
    ranks = [k for k in sorted({*RANKS[1:], 1, known.options.rank}) if k <= known.options.rank]
    low, high = 0, len(ranks) - 1
    good: tuple[Fit, Clustering] | None = None
    while low <= high:
        middle = (low + high) // 2
        found, grouped = _at_rank(known, ranks[middle])
        fits = size_of(found) <= allowed if allowed else _worst(found, known.fleet) <= target.max_error
        good = (found, grouped) if fits else good
        if fits == bool(allowed):
            low = middle + 1
        else:
            high = middle - 1
    if good is None:
        raise BundleError(
            f"no shared rank from {ranks[0]} to {ranks[-1]} meets the target ({target});"
            " the method residual has no such limit"
        )
    return good


def _worst(found: Fit, fleet: Fleet) -> float:
    return float((found.squared.sum(0) / fleet.norm.square().clamp(min=1e-300)).max().sqrt())


def _at_rank(known: _Known, rank: int) -> tuple[Fit, Clustering]:
    options, fleet = known.options, known.fleet
    grouped = cluster.fit(
        known.cores,
        clusters=options.clusters,
        rank=rank,
        max_steps=options.max_steps,
        tolerance=options.tolerance,
        seed=options.seed,
    )
    bases: dict[str, tuple[Bases, ...]] = {}
    coders: dict[str, tuple[CoreCoder, ...]] = {}
    for name, cores in known.cores.items():
        pairs = [
            _lifted(known, name, cores, fitted.U, fitted.V, grouped.cluster == c)
            for c, fitted in enumerate(grouped.fits[name])
        ]
        bases[name] = tuple(pairs)
        coders[name] = tuple(_coder(pair, known.whiteners.get(name), options) for pair in pairs)
    coding = Coding(bases, coders, grouped.cluster, fleet.norm)
    prices = torch.zeros(len(fleet.users), dtype=torch.float64)
    coded = coding.run(fleet, prices, progress=known.progress, note=f"coding, rank {rank}")
    unknown = {name: Certificate.without_basis(0) for name in bases}  # certified once a fit is kept
    made = Fit(
        bases=bases,
        cluster=grouped.cluster,
        pages=coded.pages,
        squared=coded.squared,
        certificates=unknown,
        steps={name: max(one.steps for one in fits) for name, fits in grouped.fits.items()},
        numbers=coded.numbers,
        storage=f"basis {_bits(options.basis_bits)}, cores {_bits(options.core_bits)}",
    )
    return made, grouped


def _lifted(known: _Known, name: str, cores: ModuleCores, u: Tensor, v: Tensor, members: Tensor) -> Bases:
    """Bases in feature space, as stored, from their coordinates in core space."""
    options = known.options
    if options.method == "joint-diag":
        steps = max(options.max_steps, 1) * 4
        made = diagonal.fit(
            cores.left[members], cores.right[members], (u, v), max_steps=steps, tolerance=options.tolerance
        )
        u, v = made.U, made.V
    out, inn = cores.out.double() @ u, cores.inn.double() @ v
    whitener = known.whiteners.get(name)
    if whitener is not None:
        inn = whitener.back(inn.mT).mT
    return Basis.make(out, options.basis_bits), Basis.make(inn, options.basis_bits)


def _coder(pair: Bases, whitener: Whitener | None, options: CompressOptions) -> CoreCoder:
    return CoreCoder(
        left=SideCoder.make(pair[0].matrix()),
        right=SideCoder.make(pair[1].matrix(), whitener=whitener),
        width=options.core_bits,
        diagonal=options.method == "joint-diag",
        whitener=whitener,
    )


def _bits(bits: int) -> str:
    return f"float{bits}" if bits >= 16 else f"int{bits}"


def _certificate(known: _Known, name: str, fits: tuple[CoreFit, ...]) -> Certificate:
    """Of one basis: what is certain. Of several: each is bound by what its own users leave, and that is not
    known.
    """
    cores, power = known.cores[name], known.powers[name]
    captured = sum(one.objective[-1] for one in fits)
    if len(fits) > 1:
        total = power.power.total
        return Certificate(0.0, max(total - captured, 0.0), total, total)
    weight = cores.right.square().sum((0, 1), dtype=torch.float64)
    k = fits[0].U.shape[1]
    return certify(
        power,
        (k, fits[0].V.shape[1]),
        left=cores.left.square().sum((0, 2), dtype=torch.float64),
        right=weight,
        captured=captured,
    )
