"""The default method: a shared basis where it pays, own numbers where it does not, one multiplier for all.

Every singular component of every user is coded in the cheapest of the forms of `numbers.allocate`: its
sides in coordinates of the shared basis, in numbers of their own, or both. With no basis this is the per-
adapter mixed-width SVD (method "svd"); where users are alike it becomes a shared-basis core. How much basis
a module gets is settled by the same multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from soppu.compress.codec.basis import Basis
from soppu.compress.fleet.leading import certify_leading
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.methods.coding import Coding, Fit, ModuleCoder, nothing_shared
from soppu.compress.methods.plan import ModulePlan, best, bisect, total_bits, user_errors
from soppu.compress.methods.statistics import Statistics, gather
from soppu.compress.numbers.coders import SideCoder
from soppu.compress.options import CompressOptions, ratio
from soppu.errors import BundleError

_SAMPLE = 48  # users the ranks are chosen on
_PLAN_ROUNDS = 3
_ENCODINGS = 6
_CLOSE = 0.995  # of the bytes allowed: near enough; after some codings less will do
_PATIENCE = 3
# bytes of a file, of a module, of a user, before any component; corrected once known
_OVERHEAD = (1500, 40, 36)


def fit(
    passes: Passes, options: CompressOptions, *, size_of: Callable[[Fit], int], progress: Progress
) -> Fit:
    """Compress a fleet to a target. Four passes over the adapters or more, O((o + i) r (K + r)) each a user.

    Raises:
        BundleError: the target cannot be met: the file has a size that even empty components leave.
    """
    statistics, target = gather(passes, options, progress=progress), options.target
    if target.max_error:
        found = _to_error(statistics, target.max_error)
    else:
        found = _to_bytes(statistics, target.most_bytes(passes.fleet.parameters), size_of)
    if not statistics.leading:
        return found
    ranks = {name: (out.k, inn.k) for name, ((out, inn),) in found.bases.items()}
    certificates = certify_leading(passes, statistics.leading, ranks, progress=progress)
    return replace(found, certificates=certificates)


def _to_bytes(statistics: Statistics, allowed: int, size_of: Callable[[Fit], int]) -> Fit:
    """The least error in the bytes allowed: the model proposes, the file that comes out corrects it."""
    fleet = statistics.fleet
    file, module, user = _OVERHEAD
    budget = float(allowed - (file + module * len(fleet.shapes) + user * len(fleet.users)))
    plans, good, fits = [ModulePlan()] * len(fleet.shapes), None, []
    for round_ in range(_PLAN_ROUNDS if statistics.leading else 0):
        multiplier = _price(statistics, plans, budget)
        plans = _plans(statistics, multiplier, plans if round_ else None)
    for attempt in range(_ENCODINGS):
        multiplier = _price(statistics, plans, budget)
        prices = torch.full((len(fleet.users),), multiplier, dtype=torch.float64)
        found = _encode(statistics, plans, prices, note=f"coding {attempt + 1}")
        size = size_of(found)
        fits.append(size)
        if size <= allowed and (good is None or found.squared.sum() < good.squared.sum()):
            good = found
        near = _CLOSE if attempt < _PATIENCE else 0.98
        if near * allowed <= size <= allowed:
            break
        expected = total_bits(statistics.modules, plans, statistics.costs, multiplier) / 8
        # components scale with the budget, the rest of the file does not
        budget = max(budget + (allowed * (1 - (1 - _CLOSE) / 2) - size) * budget / max(expected, 1.0), 0)
    if good is None:
        times = int(100 * ratio(fleet.parameters, min(fits))) / 100
        raise BundleError(
            f"a bundle of {allowed} bytes was asked for, the smallest found has {min(fits)} (a ratio of"
            f" {times:g}), and nothing or little of {len(fleet.users)} users in it; ask for more bytes"
        )
    return good


def _to_error(statistics: Statistics, most: float) -> Fit:
    """The fewest bytes with every user's error within the target: a multiplier for each user."""
    norm = statistics.fleet.norm
    aim = torch.full_like(norm, most**2)
    safe, plans = 0.98 * aim, [ModulePlan()] * len(statistics.modules)
    for round_ in range(_PLAN_ROUNDS if statistics.leading and bool(norm.any()) else 0):
        prices = _prices(statistics, plans, safe)
        plans = _plans(statistics, float(prices[norm > 0].median()), plans if round_ else None)
    for attempt in range(4 * _ENCODINGS):
        prices = _prices(statistics, plans, safe)
        found = _encode(statistics, plans, prices, note=f"coding {attempt + 1}")
        reached = found.squared.sum(0) / norm.square().clamp(min=1e-300)
        if not bool((over := reached > aim).any()):
            return found
        safe = torch.where(over, safe * (aim / reached).clamp(max=0.95), safe)
    worst = math.sqrt(float(reached.max()))
    raise BundleError(f"relative error {most} for every user: {worst:.2g} was reached")


def _price(statistics: Statistics, plans: list[ModulePlan], budget: float) -> float:
    """The smallest multiplier at which components and bases take no more than `budget` bytes."""
    return bisect(lambda x: total_bits(statistics.modules, plans, statistics.costs, x) / 8, max(budget, 0.0))


def _prices(statistics: Statistics, plans: list[ModulePlan], aim: Tensor) -> Tensor:
    """The largest multiplier of every user at which the expected squared error is `aim` (n,) at most."""
    low, high = torch.full_like(aim, -20.0), torch.full_like(aim, 2.0)
    for _ in range(28):
        middle = (low + high) / 2
        good = user_errors(statistics.modules, plans, statistics.costs, 10.0**middle) <= aim
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return 10.0**low


def _plans(statistics: Statistics, multiplier: float, before: list[ModulePlan] | None) -> list[ModulePlan]:
    users = len(statistics.fleet.users)
    share = min(_SAMPLE, users) / users
    starts: Sequence[ModulePlan | None] = before or [None] * len(statistics.modules)
    return [
        best(stats.sample(_SAMPLE), statistics.costs, multiplier=multiplier, share=share, start=start)
        for stats, start in zip(statistics.modules, starts, strict=True)
    ]


def _encode(statistics: Statistics, plans: list[ModulePlan], prices: Tensor, *, note: str) -> Fit:
    """Quantise the bases of the plans, and code all users against them: one pass."""
    fleet, bases, coders = statistics.fleet, {}, {}
    for (name, (o, i)), plan in zip(fleet.shapes.items(), plans, strict=True):
        power, whitener = statistics.leading.get(name), statistics.passes.whiteners.get(name)
        out = torch.zeros(o, 0) if power is None else power.ranges.out[:, : plan.k_out].float().cpu()
        inn = torch.zeros(i, 0) if power is None else power.ranges.inn[:, : plan.k_in].float().cpu()
        if whitener is not None and plan.k_in:
            inn = whitener.back(inn.mT).mT.float()
        pair = (Basis.make(out, plan.width_out), Basis.make(inn, plan.width_in))
        coder = ModuleCoder(
            left=SideCoder.make(pair[0].matrix()),
            right=SideCoder.make(pair[1].matrix(), whitener=whitener),
            menus=plan.menus(o, i, statistics.costs),
            whitener=whitener,
        )
        bases[name], coders[name] = (pair,), (coder,)
    coding = Coding(
        bases=bases,
        coders=coders,
        cluster=torch.zeros(len(fleet.users), dtype=torch.int64),
        certificates=nothing_shared(fleet),  # until it is settled which fit is kept
        steps=dict.fromkeys(fleet.shapes, 0),
        storage="integers of 2 to 8 bits, entropy coded",
    )
    return coding.run(statistics.passes, prices, progress=statistics.progress, note=note)
