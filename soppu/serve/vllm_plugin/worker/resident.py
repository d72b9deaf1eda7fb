"""Resident: one bundle in a worker's memory, as the kernels read it. Which token uses what: `step`.

The modules of a bundle lie in vLLM's layers, which may be packed (q, k and v in one) and sharded over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError
from soppu.serve.bank import from_bundle
from soppu.serve.layers.factors import ModuleFactors, SharedFactors


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
    ranks: Mapping[str, int] | None = None  # layer name -> k; None: what each bundle needs


@dataclass(frozen=True, eq=False)
class Basis:
    """The bases of one cluster at one layer, its m parts side by side, ranks padded with zeros to k."""

    V: Tensor  # (i, m k) input bases
    U: Tensor  # (k * sum of part sizes,) output bases of the parts, (k, size) each, end to end
    k: int  # the rank all parts have here
    offset: int  # where the layer's m cores (k_in, k_out) begin in a row of the table
    spans: Tensor  # (m, 2) int64 first column and size of every part

    def outputs(self) -> list[tuple[int, Tensor]]:
        """(first column, U (k, size)) of every part; views."""
        starts, sizes = self.spans.T.tolist()
        views = self.U.split([self.k * size for size in sizes])
        return [(at, view.view(self.k, -1)) for at, view in zip(starts, views, strict=True)]


@dataclass(frozen=True, eq=False)
class Resident:
    """One bundle: bases by layer and cluster, and one row of cores a user."""

    start: int  # the row number of its first user; rows are never used again while a server runs
    bases: Mapping[str, tuple[Basis, ...]]  # layer name -> one Basis a cluster
    cores: Tensor  # (rows + 1, width) all layers' cores; the last row is zero and serves the base model
    cluster: np.ndarray  # (rows + 1,) int64 whose bases a row refers to

    @property
    def rows(self) -> int:
        """Rows of users and spare ones, without the zero row."""
        return len(self.cores) - 1

    def put(self, row: int, cores: Mapping[str, Tensor], linears: Sequence[Linear], *, cluster: int) -> None:
        """Fill a row: module -> core (k_out, k_in); modules left out are not changed for this user."""
        self.cores[row].zero_()
        self.cluster[row] = cluster
        for linear in linears:
            if linear.name in self.bases:
                basis = self.bases[linear.name][cluster]
                for place, part in enumerate(linear.parts):
                    if part.module in cores:
                        core = cores[part.module].to(self.cores.device, self.cores.dtype)
                        _cell(self.cores, basis, place)[row, : core.shape[1], : core.shape[0]] = core.mT


def read(bundle: Bundle, bundle_id: str) -> dict[str, ModuleFactors]:
    """Module -> what users change there, without modules that nobody changes. Decodes every page once.

    Raises:
        BundleError: a damaged page, or users with numbers of their own beside the shared basis.
    """
    factors = from_bundle.read(bundle, cast=lambda _, tensor: tensor.float())
    own = [f.own.starts[1:] > f.own.starts[:-1] for f in factors.values() if f.own is not None]
    if own:
        users = int(torch.stack(own).any(0).sum())
        raise BundleError(
            f"bundle {bundle_id[:12]}: {users} users have numbers of their own beside the shared basis, which"
            " the vLLM plugin cannot apply; compress with --method joint, joint-diag or cluster"
        )
    return factors


def build(
    bundle: Bundle, factors: Mapping[str, ModuleFactors], linears: Sequence[Linear], form: Form
) -> Resident:
    """Lay a bundle out for the layers that hold its modules. O(n w k^2) for w modules.

    Core factors P Q are multiplied out: one product a token is faster than two.
    """
    clusters = int(bundle.cluster.max()) + 1 if len(bundle.users) else 1
    bases, width = {}, 0
    for linear in linears:
        held = [factors.get(part.module) for part in linear.parts]
        k = _rank(linear, held, form)
        if k:
            shared = [[f.shared.get(c) if f else None for f in held] for c in range(clusters)]
            bases[linear.name] = tuple(_basis(linear, these, (k, width), form) for these in shared)
            width += len(linear.parts) * k * k
    rows = len(bundle.users) + form.spare
    cluster = np.zeros(rows + 1, dtype=np.int64)
    cluster[: len(bundle.users)] = bundle.cluster.numpy()
    cores = torch.zeros(rows + 1, width, dtype=form.dtype, device=form.device)
    resident = Resident(form.start, bases, cores, cluster)
    for linear in linears:
        for place, part in enumerate(linear.parts):
            if part.module in factors:
                _fill(resident, resident.bases[linear.name][0], place, factors[part.module], bundle)
    return resident


def _rank(linear: Linear, held: Sequence[ModuleFactors | None], form: Form) -> int:
    """The rank of a layer's cores; 0 where nobody changes it. BundleError where it exceeds the fixed one."""
    sides = [shared for f in held if f for shared in f.shared.values()]
    needed = max((max(side.U.shape[1], side.V.shape[1]) for side in sides), default=0)
    fixed = needed if form.ranks is None else form.ranks[linear.name]
    if needed > fixed:
        raise BundleError(
            f"{linear.name}: shared rank {needed}, this server was started with {fixed};"
            " restart it with SOPPU_BUNDLE naming this bundle"
        )
    return fixed


def _basis(
    linear: Linear, shared: Sequence[SharedFactors | None], place: tuple[int, int], form: Form
) -> Basis:
    k, offset = place
    V = torch.zeros(linear.size, len(shared), k)
    outputs = []
    for number, (part, factors) in enumerate(zip(linear.parts, shared, strict=True)):
        U = torch.zeros(k, part.size)
        if factors is not None:
            V[:, number, : factors.V.shape[1]] = factors.V[linear.first : linear.first + linear.size]
            U[: factors.U.shape[1]] = factors.U[part.first : part.first + part.size].mT
        outputs.append(U.flatten())
    return Basis(
        V=V.flatten(1).to(form.device, form.dtype).contiguous(),
        U=torch.cat(outputs).to(form.device, form.dtype),
        k=k,
        offset=offset,
        spans=torch.tensor([[part.at, part.size] for part in linear.parts]),
    )


def _fill(resident: Resident, basis: Basis, place: int, factors: ModuleFactors, bundle: Bundle) -> None:
    cells = _cell(resident.cores, basis, place)
    for cluster, f in factors.shared.items():
        users = ((bundle.cluster == cluster) & (factors.place >= 0)).nonzero()[:, 0]
        core = f.P if f.Q is None else f.P @ f.Q
        core = core[factors.place[users]].mT.to(cells.device, cells.dtype)
        cells[users.to(cells.device), : core.shape[1], : core.shape[2]] = core


def _cell(cores: Tensor, basis: Basis, place: int) -> Tensor:
    """The cores of one part of one layer, (rows + 1, k_in, k_out); a view."""
    begin = basis.offset + place * basis.k**2
    return cores[:, begin : begin + basis.k**2].view(len(cores), basis.k, basis.k)
