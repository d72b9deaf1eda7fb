"""Resident: one bundle in a worker, as the kernels read it. Who is in memory, which token uses what: `step`.

The modules of a bundle lie in vLLM's layers, which may be packed (q, k and v in one) and sharded over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soppu.compress.bundle.shelf import Shelf
from soppu.compress.numbers.components import Components, Side
from soppu.errors import BundleError
from soppu.serve.bank import one_user
from soppu.serve.bank.from_bundle import Reading, ranks
from soppu.serve.bank.resident import OVERHEAD
from soppu.serve.layers.joined import Joined
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
class Row:
    """One user, or adapter loaded at run time, as the kernels read them."""

    cluster: int  # whose bases the core refers to
    core: Tensor | None  # (width,) all layers' cores; None where the user has none
    record: Records  # of this one user

    @property
    def size(self) -> int:
        """Bytes."""
        held = [self.record.data, *([] if self.core is None else [self.core])]
        return OVERHEAD + sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(frozen=True, eq=False)
class Resident:
    """One bundle: its bases, and where its users are. A row number means a user, or a spare place.

    What users have is read from the bundle row by row, see `step.Residents`.
    """

    start: int  # the row number of its first user; rows are never used again while a server runs
    shelf: Shelf
    bases: Mapping[str, tuple[Basis, ...]]  # layer name -> one Basis a cluster
    layers: tuple[Linear, ...]
    how: Reading
    like: Tensor  # (width, 0) of the cores' type, on their device
    spare: range  # the rows behind the users'
    added: Mapping[int, Row] = field(default_factory=dict)  # spare row -> what was loaded there
    joined: Joined = field(default_factory=Joined)

    @property
    def rows(self) -> int:
        """Rows of users and spare ones."""
        return self.spare.stop

    def read(self, place: int) -> Row:
        """What the user at a row has, from the bundle. O(page). BundleError: the page is damaged."""
        user = one_user.read(self.shelf, place, self.how)
        return Row(user.cluster, self._core(user.cores, user.cluster), user.record)

    def put(self, row: int, cores: Mapping[str, Tensor], *, cluster: int) -> Resident:
        """With a spare row filled: module -> core (k_out, k_in); modules left out are not changed."""
        return self._with(row, replace(self.nobody(), cluster=cluster, core=self._core(cores, cluster)))

    def nobody(self) -> Row:
        """The row of somebody who changes nothing."""
        shapes = tuple((len(out), len(inn)) for out, inn in self.how.cut(self.shelf.shapes))
        return Row(0, None, Records.empty(1, shapes, ranks(self.shelf.bases)))

    def with_own(self, row: int, own: Mapping[str, Components]) -> Resident:
        """With a spare row filled: module -> one user's components."""
        parts = []
        for name, (o, i) in self.shelf.shapes.items():
            sides = Side.of_own(torch.zeros(0, o), 8), Side.of_own(torch.zeros(0, i), 8)
            nothing = Components(torch.zeros(0, dtype=torch.int64), torch.zeros(0), *sides)
            parts.append(own.get(name, nothing))
        made = pack(parts, users=1, cuts=self.how.cut(self.shelf.shapes), ranks=ranks(self.shelf.bases))
        return self._with(row, Row(0, None, made))

    def _with(self, row: int, what: Row) -> Resident:
        return replace(self, added={**self.added, row: what})

    def _core(self, cores: Mapping[str, Tensor], cluster: int) -> Tensor | None:
        """All layers' cores in one row; None where there are none."""
        if not cores:
            return None
        made = torch.zeros(len(self.like))
        for linear in self.layers:
            basis = self.bases[linear.name][cluster]
            k_out, k_in = basis.k
            for place, part in enumerate(linear.parts):
                if part.module in cores:
                    core, begin = cores[part.module].float(), basis.offset + place * k_out * k_in
                    cell = made[begin : begin + k_out * k_in].view(k_in, k_out)
                    cell[: core.shape[1], : core.shape[0]] = core.mT
        return made.to(self.like)


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


def build(shelf: Shelf, linears: Sequence[Linear], form: Form) -> Resident:
    """Lay a bundle's bases out for the layers that hold its modules. O(bases); users are read later.

    Raises:
        BundleError: larger ranks than the fixed ones.
    """
    modules, bases, width = list(shelf.shapes), {}, 0
    for linear in linears:
        numbers = [modules.index(p.module) if p.module in modules else -1 for p in linear.parts]
        place = _Place(numbers, _rank(linear, shelf, form), offset=width)
        clusters = range(shelf.clusters)
        bases[linear.name] = tuple(_basis(linear, shelf, place, cluster, form) for cluster in clusters)
        width += len(linear.parts) * place.k[0] * place.k[1]
    users = len(shelf.users)
    how = Reading(_cuts(linears), thin=True)
    like = torch.zeros(width, 0, dtype=form.dtype, device=form.device)
    return Resident(form.start, shelf, bases, tuple(linears), how, like, range(users, users + form.spare))


def _rank(linear: Linear, shelf: Shelf, form: Form) -> Ranks:
    """The ranks of a layer's bases. BundleError above the fixed ones."""
    pairs = [shelf.bases[part.module][0] for part in linear.parts if part.module in shelf.bases]
    out = max((pair[0].k for pair in pairs), default=0)
    inn = max((pair[1].k for pair in pairs), default=0)
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
    """The numbers of one layer's parts in the records, ranks, and where cores begin."""

    numbers: Sequence[int]
    k: Ranks
    offset: int


def _basis(linear: Linear, shelf: Shelf, at: _Place, cluster: int, form: Form) -> Basis:
    sides = list[Sides]()
    for part in linear.parts:
        U, V = shelf.matrices(part.module, cluster) if part.module in shelf.bases else (None, None)
        out = None if U is None else U[part.first : part.first + part.size]
        inn = None if V is None else V[linear.first : linear.first + linear.size]
        sides.append((out, inn))
    spans = [(part.at, part.size, number) for part, number in zip(linear.parts, at.numbers, strict=True)]
    like = torch.zeros(linear.size, 0, dtype=form.dtype, device=form.device)
    return Basis.of(sides, spans, like=like, k=at.k, offset=at.offset)
