"""The joint methods: every user a core in one shared basis, or in one of several, or a diagonal core.

Ranges of either side are grown for the largest rank (`linalg.range_finder`), and all fitting is done in the
cores inside them. So looking for the largest rank that meets a target costs one coding pass for each rank
tried, and no further pass for the fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from soppu.compress.codec.basis import Bases, Basis
from soppu.compress.fleet.leading import EXACT_NUMBERS, EXACT_SIDE, FEW_COLUMNS
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg import bounds, cluster, diagonal, range_finder
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.cluster import Clustering
from soppu.compress.linalg.cores import Cores
from soppu.compress.linalg.tucker import CoreFit, core_energy
from soppu.compress.methods.coding import Coding, CoreCoder, Fit
from soppu.compress.numbers.coders import SideCoder
from soppu.compress.options import CompressOptions, ratio
from soppu.errors import BundleError

_CORE_SPARE = 32  # directions of core space beyond those of the bases asked for
_MOST_WIDTH = 512  # directions of core space
_MOST_GROWN = 1024  # and while it is sought
_MOST_NUMBERS = 1 << 28  # of all cores together, 1 GiB
_SAMPLE = 128  # users at least that the ranges begin with, where there are so many
_MOST_EVERY = 8


@dataclass(frozen=True, eq=False)
class GrownRanges:
    """A fleet in core space: what every rank and every coding starts from."""

    passes: Passes
    options: CompressOptions
    grown: Mapping[str, range_finder.Grown]  # module -> cores, and the joint fit at the rank of the options
    progress: Progress


def fit(
    passes: Passes, options: CompressOptions, *, size_of: Callable[[Fit], int], progress: Progress
) -> Fit:
    """Compress a fleet by the method its options name. Some eight passes, and one more a rank tried.

    Raises:
        BundleError: no rank meets the target.
    """
    ranges = grow_ranges(passes, options, progress=progress)
    found, grouped = _search(ranges, size_of) if options.target else _at_rank(ranges, options.rank)
    return replace(found, certificates=certificates(ranges, grouped))


def grow_ranges(passes: Passes, options: CompressOptions, *, progress: Progress) -> GrownRanges:
    """Grow the ranges of every module. O(n (o + i) r (K + r)) each, K the directions in the end."""
    fleet = passes.fleet
    enough = min((options.clusters + 1) * options.rank + _CORE_SPARE, _MOST_WIDTH)
    together = len(fleet.users) * int(fleet.ranks.amax(1).sum())
    # directions that all cores together have room for
    most = max(min(_MOST_NUMBERS // max(2 * together, 1), _MOST_GROWN), enough)
    # a growth there has to be
    rank = min(options.clusters * options.rank, most // 2 - 2 * range_finder.GROWTH_SPARE)
    sampled = -(-_SAMPLE // fleet.batch_size)  # batches
    every = max(min(-(-fleet.batch_count // sampled), _MOST_EVERY), 1)
    search = range_finder.Search(every=every, most_width=most, max_steps=0, seed=options.seed)
    searches = {}
    for (name, shape), ranks in zip(fleet.shapes.items(), fleet.ranks, strict=True):
        columns, q = int(ranks.sum()), min(max(int(ranks.max()), 1), *shape)
        one = replace(search, every=1, width=columns) if columns <= FEW_COLUMNS else search
        searches[name] = range_finder.grow(range_finder.Sizes(len(fleet.users), *shape, q), rank, one)
    grown = passes.run(searches, progress, note="basis")
    for name, whole in grown.items():
        # directions that hardly count, where there are many, cost time at every later step
        if min(whole.cores.left.shape[2], whole.cores.right.shape[2]) > 1.5 * enough:
            grown[name] = whole.narrowed(enough)
    return GrownRanges(passes, options, {name: grown[name].cpu() for name in fleet.shapes}, progress)


def joint(ranges: GrownRanges, rank: int) -> Clustering:
    """The bases of every module at a rank, and who uses which. O(n K r (K + r)) a step and module."""
    options = ranges.options
    if options.clusters > 1:
        return cluster.fit(
            {name: one.cores for name, one in ranges.grown.items()},
            clusters=options.clusters,
            rank=rank,
            max_steps=options.max_steps,
            tolerance=options.tolerance,
            seed=options.seed,
        )
    fits = {}
    for name, one in ranges.grown.items():
        least = options.tolerance * one.cores.total
        k = _most_rank(one.cores, rank)
        # without steps the closed form is what is asked for
        start = one.found if options.max_steps and k <= one.found.U.shape[1] else None
        fitted = one.cores.fit(k, max_steps=options.max_steps, least=least, start=start)
        fits[name] = (_diagonal(one.cores, fitted, options) if options.method == "joint-diag" else fitted,)
    return Clustering(torch.zeros(len(ranges.passes.fleet.users), dtype=torch.int64), fits, ())


def _diagonal(cores: Cores, found: CoreFit, options: CompressOptions) -> CoreFit:
    """Bases for diagonal cores, which are what is stored, from those of full ones."""
    left, right = cores.left.mT, cores.right
    steps = max(options.max_steps, 1) * 4
    made = diagonal.fit(left, right, (found.U, found.V), max_steps=steps, tolerance=options.tolerance)
    energy = core_energy(left, right)
    return CoreFit(made.U, made.V, tuple(energy - error for error in made.errors))


def certificates(ranges: GrownRanges, grouped: Clustering) -> dict[str, Certificate]:
    """What is certain of every module's basis: two passes. Of several bases nothing is: each is bound by what
    its own users leave.
    """
    if ranges.options.clusters > 1:
        unbounded = {}
        for name, fits in grouped.fits.items():
            total = ranges.grown[name].cores.total
            left = max(total - sum(one.objective[-1] for one in fits), 0.0)
            unbounded[name] = Certificate(0.0, left, total, total)
        return unbounded
    shapes = ranges.passes.fleet.shapes.values()
    sides = sum(max([side**2 for side in shape if side <= EXACT_SIDE], default=0) for shape in shapes)
    exact = EXACT_SIDE if sides <= EXACT_NUMBERS else 0
    effort = bounds.Effort(probes=16, powers=2, exact_side=exact, seed=ranges.options.seed + 1)
    searches = {
        name: range_finder.certify(ranges.grown[name].cores, one, effort)
        for name, (one,) in grouped.fits.items()
    }
    return ranges.passes.run(searches, ranges.progress, note="certificate")


def _search(ranges: GrownRanges, size_of: Callable[[Fit], int]) -> tuple[Fit, Clustering]:
    """The largest rank within the bytes allowed, or the smallest within the error.

    Bytes grow nearly in proportion to the rank, so ranks are tried where a line through those known says; an
    error halves what is left. A coding pass for each rank tried, about four for bytes.
    """
    target, fleet = ranges.options.target, ranges.passes.fleet
    allowed = target.most_bytes(fleet.parameters)
    most = max(_most_rank(one.cores, ranges.options.rank) for one in ranges.grown.values())
    low, high, line = 0, most + 1, (0, 0.0)  # low is too few or fits, high too many or fits
    good: tuple[Fit, Clustering] | None = None
    rank, tries = (most if allowed else (1 + most) // 2), 0
    while high - low > 1:
        found, grouped = _at_rank(ranges, rank)
        size = float(size_of(found)) if allowed else 0.0
        fits = size <= allowed if allowed else _worst(found, fleet) <= target.max_error
        good = (found, grouped) if fits else good
        if fits == bool(allowed):
            low, line = rank, (rank, size)
        else:
            high = rank
        slope = (size - line[1]) / (rank - line[0]) if rank > line[0] else size / rank
        tries += 1
        guess = line[0] + int((allowed - line[1]) / slope) if allowed and tries % 3 else (low + high) // 2
        rank = min(max(guess, low + 1), high - 1)
    if good is None:
        if size:
            nearest = f"rank 1 takes {size:,.0f} bytes, {ratio(fleet.parameters, int(size)):.2f}x"
        else:
            nearest = f"the worst user's error is {_worst(found, fleet):.2g} at the largest"
        raise BundleError(
            f"no shared rank from 1 to {most} meets the target ({target}): {nearest};"
            " the method residual has no such limit"
        )
    return good


def _most_rank(cores: Cores, asked: int) -> int:
    """The largest rank that makes a difference to a module."""
    return min(asked, cores.left.shape[2], cores.right.shape[2], max(cores.columns, 1))


def _worst(found: Fit, fleet: Fleet) -> float:
    return float((found.squared.sum(0) / fleet.norm.square().clamp(min=1e-300)).max().sqrt())


def _at_rank(ranges: GrownRanges, rank: int) -> tuple[Fit, Clustering]:
    options, passes = ranges.options, ranges.passes
    grouped, bases, coders = joint(ranges, rank), {}, {}
    for name, fits in grouped.fits.items():
        pairs = [_coded(ranges, name, fitted) for fitted in fits]
        bases[name], coders[name] = zip(*pairs, strict=True)
    coding = Coding(
        bases=bases,
        coders=coders,
        cluster=grouped.cluster,
        certificates=dict.fromkeys(bases, Certificate.without_basis(0)),  # certified once a fit is kept
        steps={name: max(one.steps for one in fits) for name, fits in grouped.fits.items()},
        storage=f"basis {_bits(options.basis_bits)}, cores {_bits(options.core_bits)}",
    )
    prices = torch.zeros(len(passes.fleet.users), dtype=torch.float64)
    return coding.run(passes, prices, progress=ranges.progress, note=f"coding, rank {rank}"), grouped


def _coded(ranges: GrownRanges, name: str, found: CoreFit) -> tuple[Bases, CoreCoder]:
    """Bases in feature space, as stored, from their coordinates in core space; and what codes with them."""
    options, cores, whitener = ranges.options, ranges.grown[name].cores, ranges.passes.whiteners.get(name)
    inn = cores.basis_in @ found.V
    inn = inn if whitener is None else whitener.back(inn.mT).mT
    pair = Basis.make(cores.basis_out @ found.U, options.basis_bits), Basis.make(inn, options.basis_bits)
    return pair, CoreCoder(
        left=SideCoder.make(pair[0].matrix()),
        right=SideCoder.make(pair[1].matrix(), whitener=whitener),
        width=options.core_bits,
        diagonal=options.method == "joint-diag",
        whitener=whitener,
    )


def _bits(bits: int) -> str:
    return f"float{bits}" if bits >= 16 else f"int{bits}"
