"""Resident: one bundle in a worker's memory, as the kernels read it. Which token uses what: `step`.

The modules of a bundle lie in vLLM's layers, which may be packed (q, k and v in one) and sharded over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle
from soppu.compress.numbers.components import Components, Side
from soppu.errors import BundleError
from soppu.serve.bank import from_bundle
from soppu.serve.layers.factors import ModuleFactors
from soppu.serve.layers.kernels import Basis, Ranks, Sides
from soppu.serve.layers.records import Records, pack


@dataclass(frozen=True)
class Part:
    """One module of the base model inside a layer, as this rank holds it."""

    module: str  # its name in the base model
    shape: tuple[int, int]  # (o, i) of the whole module
    first: int  # first of the module's o rows that this rank holds
    size: int  # how many it holds
    at: int  # the column of the layer's output where they begin


@dataclass(frozen=True)
class Linear:
    """One linear layer of the engine, as this rank holds it."""

    name: str  # in the engine
    first: int  # first of the input features that this rank holds
    size: int  # how many it holds
    out: int  # columns of this rank's output
    parts: tuple[Part, ...]  # the modules in it, in the order of their columns


@dataclass(frozen=True)
class Form:
    """How tensors are kept, and where a bundle's rows lie."""

    dtype: torch.dtype
    device: torch.device
    start: int = 1  # its first user's row
    spare: int = 0
    ranks: Mapping[str, Ranks] | None = None  # layer name -> k_out, k_in; None: what each bundle needs


@dataclass(frozen=True, eq=False)
class Resident:
    """One bundle: bases by layer and cluster, cores of those who have cores, and everybody's records.

    A row number means a user, or a spare place behind them; not everybody needs a row of cores.
    """

    start: int  # the row number of its first user; rows are never used again while a server runs
    bases: Mapping[str, tuple[Basis, ...]]  # layer name -> one Basis a cluster
    cores: Tensor  # (rows of cores + 1, width) all layers' cores; the last row is zero
    core: np.ndarray  # (rows,) int64 which row of cores is a row's; -1 where it has none
    cluster: np.ndarray  # (rows,) int64 whose bases a row refers to
    records: Records
    recorded: np.ndarray  # (rows,) int64 which record is a row's; -1 where it has none
    modules: Sequence[str]  # in the order of the records; none where nobody has a record
    spare: range  # the rows behind the users'

    @property
    def rows(self) -> int:
        """Rows of users and spare ones."""
        return len(self.core)

    def put(self, row: int, cores: Mapping[str, Tensor], linears: Sequence[Linear], *, cluster: int) -> None:
        """Fill a spare row: module -> core (k_out, k_in); modules left out are not changed for this user."""
        where = self.core[row]
        self.cores[where].zero_()
        self.cluster[row], self.recorded[row] = cluster, -1
        for linear in linears:
            if linear.name in self.bases:
                basis = self.bases[linear.name][cluster]
                for place, part in enumerate(linear.parts):
                    if part.module in cores:
                        core = cores[part.module].to(self.cores.device, self.cores.dtype)
                        _cell(self.cores, basis, place)[where, : core.shape[1], : core.shape[0]] = core.mT

    def with_own(self, row: int, own: Mapping[str, Components], linears: Sequence[Linear]) -> Resident:
        """The same with a spare row filled: module -> one user's components. Copies all records."""
        held, parts, cuts = _cuts(linears), [], []
        for name, (o, i) in zip(self.modules, self.records.shapes, strict=True):
            sides = Side.of_own(torch.zeros(0, o), 8), Side.of_own(torch.zeros(0, i), 8)
            nothing = Components(torch.zeros(0, dtype=torch.int64), torch.zeros(0), *sides)
            parts.append(own.get(name, nothing))
            cuts.append(held.get(name, (range(o), range(i))))
        made = pack(parts, users=1, cuts=cuts, ranks=self.records.ranks)
        users = self.spare.start
        others = [other for other in self.spare if other != row and self.recorded[other] >= 0]
        kept = [self.records.slice(place, place + 1) for place in self.recorded[others]]
        recorded = self.recorded.copy()
        recorded[[*others, row]] = np.arange(users, users + len(others) + 1)
        self.cores[self.core[row]].zero_()
        return replace(
            self, records=Records.join([self.records.slice(0, users), *kept, made]), recorded=recorded
        )


def read(bundle: Bundle, linears: Sequence[Linear]) -> dict[str, ModuleFactors]:
    """Module -> what users change there, or could: where it has bases. Decodes every page once.

    Records hold what this rank's layers have of their modules. BundleError: a damaged page.
    """
    fitting = [
        replace(line, parts=tuple(p for p in line.parts if bundle.shapes.get(p.module) == p.shape))
        for line in linears
    ]
    how = from_bundle.Reading(_cuts(fitting), thin=True, all_bases=True)
    return from_bundle.read(bundle, cast=lambda _, tensor: tensor.float(), how=how)


def _cuts(linears: Sequence[Linear]) -> dict[str, tuple[range, range]]:
    """Module -> the outputs and inputs of it that this rank holds."""
    return {
        part.module: (
            range(part.first, part.first + part.size),
            range(linear.first, linear.first + linear.size),
        )
        for linear in linears
        for part in linear.parts
    }


def build(
    bundle: Bundle, factors: Mapping[str, ModuleFactors], linears: Sequence[Linear], form: Form
) -> Resident:
    """Lay a bundle out for the layers that hold its modules. O(n w k^2) for w modules.

    Core factors P Q are multiplied out: one product a token is faster than two.
    """
    clusters = int(bundle.cluster.max()) + 1 if len(bundle.users) else 1
    bases, width = {}, 0
    records = next((f.own.records for f in factors.values() if f.own), _NOBODY)
    modules = list(bundle.shapes) if records is not _NOBODY else []
    for linear in linears:
        held = [factors.get(part.module) for part in linear.parts]
        k = _rank(linear, held, form)
        numbers = [modules.index(p.module) if p.module in modules else -1 for p in linear.parts]
        place = _Place(held, numbers, k, offset=width)
        bases[linear.name] = tuple(_basis(linear, place, cluster, form) for cluster in range(clusters))
        width += len(linear.parts) * k[0] * k[1]
    rows = len(bundle.users) + form.spare
    cluster, core, recorded = np.zeros(rows, np.int64), np.full(rows, -1), np.full(rows, -1)
    cluster[: len(bundle.users)] = bundle.cluster.numpy()
    has = np.ones(rows, np.bool_)
    has[: len(bundle.users)] = _cored(factors, len(bundle.users))
    core[has] = np.arange(has.sum())
    some = (records.starts[1:] > records.starts[:-1]).numpy()
    recorded[: len(some)][some] = some.nonzero()[0]
    cores = torch.zeros(int(has.sum()) + 1, width, dtype=form.dtype, device=form.device)
    whose = (core, cluster, records, recorded, modules, range(len(bundle.users), rows))
    resident = Resident(form.start, bases, cores, *whose)
    for linear in linears:
        for number, part in enumerate(linear.parts):
            if part.module in factors:
                _fill(resident, resident.bases[linear.name][0], number, factors[part.module], bundle)
    return resident


_NOBODY = Records(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), (), ())


def _cored(factors: Mapping[str, ModuleFactors], users: int) -> np.ndarray:
    """(users,) whether anybody has a core at any module."""
    has = np.zeros(users, np.bool_)
    for f in factors.values():
        has |= (f.place >= 0).numpy()
    return has


def _rank(linear: Linear, held: Sequence[ModuleFactors | None], form: Form) -> Ranks:
    """The ranks of a layer's bases; 0 on a side that nobody refers to. BundleError above the fixed ones."""
    sides = [pair for f in held if f for pair in f.bases.values()]
    out = max((U.shape[1] for U, _ in sides if U is not None), default=0)
    inn = max((V.shape[1] for _, V in sides if V is not None), default=0)
    if form.ranks is None:
        return out, inn
    fixed = form.ranks[linear.name]
    if out > fixed[0] or inn > fixed[1]:
        raise BundleError(
            f"{linear.name}: shared ranks {out}, {inn}, this server was started with {fixed[0]}, {fixed[1]};"
            " restart it with SOPPU_BUNDLE naming this bundle"
        )
    return fixed


@dataclass(frozen=True)
class _Place:
    """What is held of the parts of one layer, their numbers in the records, ranks, and where cores begin."""

    held: Sequence[ModuleFactors | None]
    numbers: Sequence[int]
    k: Ranks
    offset: int


def _basis(linear: Linear, at: _Place, cluster: int, form: Form) -> Basis:
    sides = list[Sides]()
    for part, factors in zip(linear.parts, at.held, strict=True):
        U, V = factors.bases.get(cluster, (None, None)) if factors else (None, None)
        out = None if U is None else U[part.first : part.first + part.size]
        inn = None if V is None else V[linear.first : linear.first + linear.size]
        sides.append((out, inn))
    spans = [(part.at, part.size, number) for part, number in zip(linear.parts, at.numbers, strict=True)]
    like = torch.zeros(linear.size, 0, dtype=form.dtype, device=form.device)
    return Basis.of(sides, spans, like=like, k=at.k, offset=at.offset)


def _fill(resident: Resident, basis: Basis, place: int, factors: ModuleFactors, bundle: Bundle) -> None:
    cells = _cell(resident.cores, basis, place)
    for cluster, f in factors.shared.items():
        users = ((bundle.cluster == cluster) & (factors.place >= 0)).nonzero()[:, 0]
        core = f.P if f.Q is None else f.P @ f.Q
        core = core[factors.place[users]].mT.to(cells.device, cells.dtype)
        where = torch.from_numpy(resident.core[users.numpy()]).to(cells.device)
        cells[where, : core.shape[1], : core.shape[2]] = core


def _cell(cores: Tensor, basis: Basis, place: int) -> Tensor:
    """The cores of one part of one layer, (rows + 1, k_in, k_out); a view."""
    k_out, k_in = basis.k
    begin = basis.offset + place * k_out * k_in
    return cores[:, begin : begin + k_out * k_in].view(len(cores), k_in, k_out)
