"""Cores in, one bundle out: one pass over the users, a batch of them in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from soppu import base_identity
from soppu.adapter import LoraAdapter, validate
from soppu.base_identity import Base
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.codec.page import PageWriter
from soppu.compress.cored import batch
from soppu.compress.cored.batch import CodedBatch
from soppu.compress.cored.groups import Cores, Group, Pairs
from soppu.compress.cored.kept import KeptBasis, View
from soppu.compress.cored.told import Totals, report_of
from soppu.compress.fleet.passes import Progress
from soppu.compress.linalg.tucker import LARGEST_NORM
from soppu.compress.options import CompressOptions
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError

Told = LoraAdapter | CoreAdapter
_BATCH_NUMBERS = 1 << 22  # numbers of adapters and cores held at a time, and at most one user more
_MOST_USERS = 256


def compress_cores(
    members: Mapping[str, Told],
    basis: CoreBasis,
    options: CompressOptions,
    *,
    adapter_ids: Mapping[str, str] | None = None,
    older: Callable[[str], CoreBasis] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """A bundle of users who are told in a basis. Nothing is fitted: O(users k^3) a module, in one pass.

    With `basis_bits` and `core_bits` of 32 basis and cores are kept bit for bit; with fewer they are rounded,
    and the report has the errors. Other options decide nothing. Cores of another basis are carried over, and
    adapters that were trained freely are projected, as far as the basis spans them; what is lost is an error.

    Args:
        members: user -> core or adapter, each looked up once.
        adapter_ids: user -> id the bundle records; by default the registry's id of the content.
        older: reads another basis that a core names; None refuses such cores.

    Raises:
        AdapterError: no members, one that is malformed, or of another base model, basis or layout.
        BundleError: nothing of anybody would be left.
    """
    started = time.perf_counter()
    if not members:
        raise AdapterError("no adapters to compress; at least one is needed")
    desk = _Desk(basis, KeptBasis.of(basis, bits=options.basis_bits), older)
    writer, totals = PageWriter(), Totals()
    for some in _some(members):
        coded = desk.code(some, bits=options.core_bits)
        writer.add(coded.parts, users=len(some))
        totals.add(coded, some, adapter_ids)
        if progress:
            progress("cores", len(totals.users), len(members))
    pages = writer.close()
    report = report_of(totals, desk.kept, basis, options, numbers=writer.numbers)
    return Bundle(
        users=tuple(totals.users),
        adapter_ids=tuple(totals.ids),
        base_model=desk.base.name,
        base_hash=desk.base.hash,
        fan_in_fan_out=basis.fan_in_fan_out,
        shapes=basis.module_shapes(),
        ranks=totals.joined("ranks"),
        bases={name: (pair,) for name, pair in desk.kept.bases.items()},
        cluster=torch.zeros(len(totals.users), dtype=torch.int64),
        norm=totals.joined("relative_to"),
        pages=pages,
        common=basis.common,
        report=replace(report, seconds=time.perf_counter() - started),
    )


def _some(members: Mapping[str, Told]) -> Iterator[dict[str, Told]]:
    """The members in order, a batch at a time."""
    held: dict[str, Told] = {}
    numbers = 0
    for user, one in members.items():
        held[user] = one
        numbers += one.parameters()
        if len(held) == _MOST_USERS or numbers >= _BATCH_NUMBERS:
            yield held
            held, numbers = {}, 0
    if held:
        yield held


@dataclass(eq=False)
class _Desk:
    """The kept basis, and other bases as they are seen from it, each decomposed once."""

    basis: CoreBasis
    kept: KeptBasis
    older: Callable[[str], CoreBasis] | None
    base: Base = Base()
    bases: dict[str, CoreBasis] = field(default_factory=dict)
    views: dict[str, dict[str, View]] = field(default_factory=dict)

    def code(self, some: Mapping[str, Told], *, bits: int) -> CodedBatch:
        coded = batch.code(self._groups(some), self.kept, users=len(some), bits=bits)
        for user, size in zip(some, coded.norm.tolist(), strict=True):
            if not size <= LARGEST_NORM:
                raise AdapterError(f"{user}: norm {size:.3g}, allowed: up to {LARGEST_NORM:.3g}")
        return coded

    def _groups(self, some: Mapping[str, Told]) -> list[Group]:
        """Users of one batch, put together as they are told; each is checked."""
        places: dict[str, list[int]] = {}
        told = list(some.values())
        for place, (user, one) in enumerate(some.items()):
            key = self._core(user, one) if isinstance(one, CoreAdapter) else self._pairs(user, one)
            places.setdefault(key, []).append(place)
        made: list[Group] = []
        for key, here in places.items():
            members = [told[place] for place in here]
            if key:
                cores = [one for one in members if isinstance(one, CoreAdapter)]
                made.append(Cores(torch.tensor(here), self.kept, cores, self.views[key]))
            else:
                pairs = [one for one in members if isinstance(one, LoraAdapter)]
                made.append(Pairs(torch.tensor(here), self.kept, pairs))
        return made

    def _core(self, user: str, core: CoreAdapter) -> str:
        """Check a core against the basis that it names, whose id is given back."""
        basis_id = core.basis_id
        if basis_id not in self.bases:
            self.bases[basis_id] = self._read(user, basis_id)
            self.views[basis_id] = self.kept.seen_from(self.bases[basis_id])
        CoreInBasis(core, self.bases[basis_id], who=user)
        self._join(user, core.base)
        return basis_id

    def _read(self, user: str, basis_id: str) -> CoreBasis:
        if basis_id == self.basis.id:
            return self.basis
        if self.older is None:
            raise AdapterError(
                f"{user}: the core is told in basis {basis_id}, found basis {self.basis.id}; carry it over"
            )
        found = self.older(basis_id)
        base_identity.check(found.base, self.basis.base, who=f"basis {basis_id}", whose="the basis is for")
        return found

    def _pairs(self, user: str, adapter: LoraAdapter) -> str:
        """Check an adapter against the basis; it is told in none."""
        validate(adapter, who=user)
        if adapter.fan_in_fan_out != self.basis.fan_in_fan_out:
            layouts = f"{adapter.fan_in_fan_out}, the basis has {self.basis.fan_in_fan_out}"
            raise AdapterError(f"{user}: fan_in_fan_out is {layouts}: one base model stores weights one way")
        shapes = self.basis.module_shapes()
        for name, (o, _, i) in adapter.shapes().items():
            if name in shapes and shapes[name] != (o, i):
                raise AdapterError(f"{user}: {name}: shape {(o, i)}, the basis has {shapes[name]}")
        if not adapter.pairs.keys() & shapes.keys():
            raise AdapterError(f"{user}: changes no module that the basis has, such as {next(iter(shapes))}")
        self._join(user, adapter.base)
        return ""

    def _join(self, user: str, base: Base) -> None:
        known = self.base if self.base != Base() else self.basis.base
        base_identity.check(base, known, who=user, whose="the basis is for")
        self.base = known.joined(base)
