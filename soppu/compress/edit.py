"""Adding a user to a bundle and removing one, without fitting it again.

A new user is coded against the stored bases: in coordinates alone where that is exact enough, with
own numbers where it is not, and refused where even these do not fit, to wait for the next compression.
Nothing is accepted above the error that was allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu import base_identity
from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.codec import page
from soppu.compress.codec.page import Page, numbers
from soppu.compress.fleet import survey as fleets
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.canonical import canonical
from soppu.compress.methods.coding import ModuleCoder
from soppu.compress.methods.plan import ModulePlan
from soppu.compress.numbers.allocate import Costs, choose
from soppu.compress.numbers.coders import SideCoder
from soppu.compress.numbers.components import Components
from soppu.compress.numbers.errors import relative_errors, squared_errors
from soppu.cores.core import is_core
from soppu.errors import AdapterError, BundleError, ConfigError

BASIS, RESIDUAL, QUEUED = "basis", "residual", "queued"
_STEPS = 24
_TRIES = 6
_FREE = 1e-30  # the price of a bit where only the error counts


@dataclass(frozen=True, eq=False)
class Projection:
    """What became of a new user: "basis" if coordinates were enough, "residual" if own numbers were needed,
    "queued" if the user waits for the next compression.
    """

    outcome: str
    bundle: Bundle  # with the user in it; the one that was given where queued
    error: float  # relative error of the user as stored, or the least found where queued
    added: int  # bytes of the new page


def project(
    bundle: Bundle,
    user: str,
    adapter: LoraAdapter,
    *,
    max_error: float,
    max_bytes: int = 0,
    adapter_id: str = "",
) -> Projection:
    """Add a user to a bundle without touching anybody else's numbers. O((o + i)(k + r) r) a module and try.

    Args:
        max_error: relative error the user may have at most.
        max_bytes: bytes the user may take at most; 0 allows what the adapter has at 16 bits a number.
        adapter_id: what the bundle records; by default the registry's id of the adapter's content.

    Raises:
        AdapterError: the adapter does not belong to this base model, or changes a module the bundle lacks.
        BundleError: the user is in the bundle already.
        ConfigError: `max_error` out of its range.
    """
    if not 0 < max_error < 1:
        raise ConfigError(f"max_error = {max_error}, allowed: above 0 and below 1")
    if user in bundle.users:
        raise BundleError(f"user {user!r} is in the bundle already; remove the user first")
    newcomer = newcomer_of(bundle, user, adapter, adapter_id)
    allowed = max_bytes or 2 * newcomer.parameters
    clusters = range(len(next(iter(bundle.bases.values()))))
    tries: list[tuple[str, Coded]] = []
    if all(out.k and inn.k for pairs in bundle.bases.values() for out, inn in pairs):
        inside = (_Bench(bundle, newcomer, cluster, shared_only=True).code(_FREE) for cluster in clusters)
        tries.append((BASIS, min(inside, key=lambda coded: coded.error)))
    if not tries or tries[0][1].error > max_error:
        cluster = tries[0][1].cluster if tries else 0
        tries.append((RESIDUAL, _with_own(_Bench(bundle, newcomer, cluster), max_error)))
    outcome, coded = tries[-1]
    data = page.encode(coded.parts, users=1)
    if coded.error > max_error or len(data) > allowed:
        return Projection(QUEUED, bundle, min(one.error for _, one in tries), len(data))
    return Projection(outcome, extended(bundle, newcomer, coded, data), coded.error, len(data))


@dataclass(frozen=True, eq=False)
class Coded:
    """A newcomer as stored."""

    parts: list[Components]  # one entry a module, the user numbered 0
    squared: Tensor  # (modules, 1) squared Frobenius errors
    error: float  # relative, of the whole adapter
    cluster: int
    relative_to: Tensor | None = None  # (1,) what gains are relative to, where it is not the norm


def newcomer_of(bundle: Bundle, user: str, adapter: LoraAdapter, adapter_id: str) -> Fleet:
    """The user as a fleet of one that has the bundle's modules. Raises AdapterError as `project` does."""
    ids = {user: adapter_id} if adapter_id else None
    alone = fleets.survey({user: adapter}, adapter_ids=ids, device=torch.device("cpu"))
    base_identity.check(adapter.base, bundle.base, who=user, whose="the bundle is for")
    if adapter.fan_in_fan_out != bundle.fan_in_fan_out:
        layouts = f"{adapter.fan_in_fan_out}, the bundle has {bundle.fan_in_fan_out}"
        raise AdapterError(f"{user}: fan_in_fan_out is {layouts}: one base model stores weights one way")
    known = bundle.base.joined(adapter.base)
    for name, shape in alone.shapes.items():
        if bundle.shapes.get(name) != shape:
            raise AdapterError(f"{user}: {name}: shape {shape}, the bundle has {bundle.shapes.get(name)}")
    rows = {name: row for row, name in enumerate(alone.shapes)}
    place = torch.tensor([rows.get(name, -1) for name in bundle.shapes])
    has = (place >= 0)[:, None]
    return replace(
        alone,
        base_model=known.name,
        base_hash=known.hash,
        shapes=bundle.shapes,
        ranks=torch.where(has, alone.ranks[place], 0),
        norms=torch.where(has, alone.norms[place], 0.0),
    )


class _Bench:
    """One newcomer before the bases of one cluster: decomposed once, coded as often as it takes."""

    def __init__(self, bundle: Bundle, newcomer: Fleet, cluster: int, *, shared_only: bool = False) -> None:
        costs = Costs()
        self.cluster, self.norm = cluster, newcomer.norm
        (batch,) = newcomer.batches()
        self.deltas = {name: batch.factors(name) for name in bundle.shapes}
        self.factors = {name: canonical(B, A) for name, (B, A) in self.deltas.items()}
        self.coders = {}
        for name, (o, i) in bundle.shapes.items():
            u, v = bundle.matrices(name, cluster)
            plan = ModulePlan(*(side.k for side in bundle.bases[name][cluster]))
            menus = plan.menus(o, i, costs, shared_only=shared_only)
            self.coders[name] = ModuleCoder(SideCoder.make(u), SideCoder.make(v), None, menus)
        self._sides = {
            name: coder.sides(self.factors[name], self.norm) for name, coder in self.coders.items()
        }

    def expected(self, price: float) -> float:
        """The squared relative error the model expects when a bit has this price."""
        found = (choose(self._sides[name], *coder.menus, price) for name, coder in self.coders.items())
        return sum(float(choice.error.double().sum()) for choice in found)

    def code(self, price: float) -> Coded:
        """The user as it would be stored."""
        prices = torch.full((1,), price, dtype=torch.float64)
        coded = [coder.code(self.factors[name], self.norm, prices) for name, coder in self.coders.items()]
        parts = [part for part, _ in coded]
        squared = torch.stack(
            [
                squared_errors(*self.deltas[name], part, coder.bases, norm=self.norm)
                for (name, coder), part in zip(self.coders.items(), parts, strict=True)
            ]
        )
        error = float(relative_errors(squared.sum(0), self.norm)[0])
        return Coded(parts, squared, error, self.cluster)


def _with_own(bench: _Bench, max_error: float) -> Coded:
    """The user with own numbers where the basis falls short, at a price the coding corrects."""
    aim = max_error**2
    for _ in range(_TRIES):
        low, high = -20.0, 0.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if bench.expected(10.0**middle) <= aim else (low, middle)
        coded = bench.code(10.0**low)
        if coded.error <= max_error:
            break
        aim *= min((max_error / coded.error) ** 2, 0.95)
    return coded


def extended(bundle: Bundle, newcomer: Fleet, coded: Coded, data: bytes) -> Bundle:
    """The bundle with one page more, whose bytes are `data`; bases and other pages are the same objects."""
    (user,), report = newcomer.users, bundle.report
    errors = relative_errors(coded.squared, newcomer.norms)[:, 0].tolist()
    modules = {
        name: dict(report.module_error[name]) | ({user: error} if rank else {})
        for name, error, rank in zip(bundle.shapes, errors, newcomer.ranks[:, 0].tolist(), strict=True)
    }
    added = sum(len(p) + numbers(p) for p in coded.parts)
    relative_to = newcomer.norm if coded.relative_to is None else coded.relative_to
    return replace(
        bundle,
        users=(*bundle.users, user),
        base_model=newcomer.base_model,
        base_hash=newcomer.base_hash,
        adapter_ids=(*bundle.adapter_ids, newcomer.adapter_ids[0]),
        ranks=torch.cat([bundle.ranks, newcomer.ranks], 1),
        cluster=torch.cat([bundle.cluster, torch.tensor([coded.cluster])]),
        norm=torch.cat([bundle.norm, relative_to.float()]),
        pages=(*bundle.pages, Page(len(bundle.users), 1, data)),
        report=replace(
            report,
            relative_error=dict(report.relative_error) | {user: coded.error},
            module_error=modules,
            parameters_before=report.parameters_before + newcomer.parameters,
            parameters_after=report.parameters_after + added,
        ),
        _last={},
    )


def forget(bundle: Bundle, user: str) -> Bundle:
    """Take a user's numbers out. The bases stay, and the bundle says whom they have seen. O(page).

    Only a refit without the user makes bases that have not.

    Raises:
        BundleError: the bundle does not hold the user, or nobody else.
    """
    index = bundle.index(user)
    if len(bundle.users) == 1:
        raise BundleError(f"user {user!r} is the only one in the bundle; delete the bundle instead")
    keep = torch.arange(len(bundle.users)) != index
    shared = any(side.k for pairs in bundle.bases.values() for pair in pairs for side in pair)
    report, gone = bundle.report, bundle.adapter_ids[index]
    pages, taken = _pages_without(bundle, index)
    sizes = zip(bundle.shapes.values(), bundle.ranks[:, index].tolist(), strict=True)
    kept = sum(map(numbers, taken))
    given = kept if is_core(gone) else sum((o + i) * rank for (o, i), rank in sizes)
    return replace(
        bundle,
        users=tuple(name for name in bundle.users if name != user),
        adapter_ids=tuple(a for place, a in enumerate(bundle.adapter_ids) if place != index),
        ranks=bundle.ranks[:, keep],
        cluster=bundle.cluster[keep],
        norm=bundle.norm[keep],
        pages=pages,
        basis_saw=(*bundle.basis_saw, gone) if shared else bundle.basis_saw,
        report=replace(
            report,
            relative_error=_without(report.relative_error, user),
            module_error={name: _without(errors, user) for name, errors in report.module_error.items()},
            parameters_before=max(report.parameters_before - given, 0),
            parameters_after=report.parameters_after - kept - sum(map(len, taken)),
        ),
        _last={},
    )


def _pages_without(bundle: Bundle, index: int) -> tuple[tuple[Page, ...], list[Components]]:
    """All pages, that of user `index` written anew, and what the user had, module by module."""
    made, first, taken = [], 0, list[Components]()
    for number, held in enumerate(bundle.pages):
        one = held
        if held.first <= index < held.first + held.users:
            parts = bundle.components(number)
            taken = [part.select(part.user == index) for part in parts]
            if held.users == 1:
                continue
            shift = torch.arange(held.first + held.users) - held.first
            shift[index:] -= 1
            rest = [part.select(part.user != index).renumbered(shift) for part in parts]
            one = Page(first, held.users - 1, page.encode(rest, users=held.users - 1))
        made.append(replace(one, first=first))
        first += one.users
    return tuple(made), taken


def _without(values: Mapping[str, float], user: str) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != user}
